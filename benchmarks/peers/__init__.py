"""The same model through Cierzo and through the engines that people use today, side by side."""
