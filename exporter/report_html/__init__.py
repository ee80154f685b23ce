"""The parts of the page that `exporter.html_report` puts together: style, tables, plots and sections."""
