"""The words of the demo's stories: rules of a small grammar, each a set of alternatives.

A rule's text may use the notation that :mod:`exporter.demo_data.grammar` expands: ``{a|b}`` chooses, ``<name>`` refers
to another rule or to a fact of the story being told.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


GIRLS = _words("Inés|Lucía|Pilar|Marta|Elena|Noa|Carmen|Alba|Clara|Rosa")
BOYS = _words("Mateo|Hugo|Tomás|Bruno|Iker|Pablo|Leo|Daniel|Jorge|Íñigo")
JOBS = _words(
    "sailor|miller|baker|shepherd|fisher|gardener|carpenter|painter|singer|potter|weaver|beekeeper|ferry pilot|teacher"
)
TOWNS = _words("Zaragoza|Tudela|Tortosa|Caspe|Gallur|Alagón|Amposta|Sástago|Escatrón|Mequinenza")
BEASTS = _words("gull|dog|donkey|stork|swallow|goat|cat|heron|owl|duck|fox|crow")
BOATS = _words("boat|ferry|barge|little ship|fishing boat")
THINGS = _words(
    "red scarf|blue kite|old map|silver bell|straw hat|paper boat|brass key|long letter|wooden flute|green lantern|"
    "little drum|white shawl|glass bottle|woollen coat|yellow flag|clay cup"
)

LEXICON: dict[str, tuple[str, ...]] = {
    "wind_adj": _words("cold|dry|strong|wild|restless|bitter|sharp|northern|rough|loud|stubborn|clear"),
    "soft_adj": _words("soft|warm|gentle|quiet|slow|sweet|kind|mild"),
    "sky_adj": _words("grey|pale|clear|dark|wide|heavy|bright|blue|white|golden"),
    "place_adj": _words("old|narrow|quiet|crooked|steep|stony|dusty|sunny|empty|little|windy|green"),
    "house_adj": _words("small|white|crooked|tall|low|stone|yellow|warm|tidy|old"),
    "mood": _words("happy|proud|glad|calm|hopeful|cheerful|thankful|content"),
    "sad": _words("sad|tired|worried|lonely|cold|afraid|hungry|troubled"),
    "how": _words("slowly|quietly|gently|softly|carefully|patiently|gladly|kindly|calmly"),
    "sky_thing": _words("clouds|swallows|leaves|feathers|gulls|petals|seeds|sparks"),
    "tree": _words("olive tree|almond tree|fig tree|poplar|pine|old oak|lemon tree|willow"),
    "trees": _words("olive trees|almond trees|fig trees|poplars|pines|old oaks|lemon trees|vines"),
    "herb": _words("thyme|rosemary|lavender|mint|sage|wild fennel"),
    "food": _words("bread|cheese|soup|honey|olives|figs|almonds|grapes|fresh fish|lentils|peaches|warm milk|oranges"),
    "drink": _words("coffee|hot chocolate|cold water|warm milk|mint tea|lemon water"),
    "colour": _words("red|blue|green|yellow|white|grey|brown|golden|silver"),
    "part_of_town": _words("harbour|square|market|bridge|old wall|church tower|café|bakery|fountain|long street|wharf"),
    "in_town": _words(
        "in the square|at the market|by the harbour|near the old bridge|behind the church|at the café on the corner|"
        "by the fountain|under the town wall|beside the river|at the end of the street"
    ),
    "outside": _words(
        "on the hill|among the <trees>|by the river|on the <place_adj> road|beyond the last house|near the mill|"
        "between two fields|under the <tree>|on the far bank|along the canal"
    ),
    "people": _words("the neighbours|the children|the sailors|the old women|the fishers|the shepherds|the bakers"),
    "one_person": _words(
        "an old woman|a boy with a basket|a girl with a drum|the postman|a tired shepherd|an old sailor|the baker's son|"
        "a woman from the islands|a man with a donkey"
    ),
    "sound": _words("sang|whistled|howled|sighed|hummed|roared|whispered|laughed|murmured|cried"),
    "shook": _words("shook|rattled|beat|pushed|pulled|rocked|knocked at|tugged at"),
    "house_thing": _words("shutters|doors|windows|roofs|chimneys|gates|tiles|signs|awnings"),
    "day_time": _words("morning|afternoon|evening|day"),
    "season": _words("spring|summer|autumn|winter"),
    "month": _words("January|February|March|April|May|October|November|December"),
    "count": _words("two|three|four|five|six|seven|ten|twelve"),
    "far": _words("over the hills|from the north|down the valley|across the plain|from the mountains"),
    "good": _words("good|kind|brave|patient|cheerful|gentle"),
    "exclaim": _words("Oh|Ah|Well|Look|Listen|Ay|Come"),
    "said": _words("said|answered|replied|whispered|called"),
    "asked": _words("asked|wondered|wanted to know"),
    "smell": _words("bread|salt|rain|wood smoke|<herb>|wet earth|coffee|ripe fruit|tar and rope"),
    "walked": _words("walked|went|climbed|ran|wandered|hurried|strolled"),
    "saying": _words(
        "The wind takes nothing that it does not bring back|Who walks with a friend never walks far|"
        "Bread is better when two people eat it|Slow water also reaches the sea|No storm is longer than the night|"
        "A closed door hears nothing|The smallest bell wakes the whole town|Every road begins at a kitchen table|"
        "He who plants an olive tree thinks of his grandchildren|Even the Ebro was once a drop of rain"
    ),
}

FILLERS: dict[str, tuple[str, ...]] = {
    "day": (
        "The {wind|cierzo} came <far> and <shook> the <house_thing>.",
        "It {smelled|smelt} of <smell> and of <smell> in every street.",
        "{High above|Far above|Over} the {roofs|houses|towers}, <sky_thing> {turned|flew|danced} in the <sky_adj> sky.",
        "The Ebro {ran|went|flowed} {brown|green|wide|slow|quick} and {quiet|full|deep|bright} under the {bridge|trees|sun}.",
        "{In those days|At that time of the year|In <month>}, the {fields|hills|orchards} were {<colour>|golden|bare} and the sky was <sky_adj>.",
        "{Somewhere|Not far away|Behind a wall}, a {dog barked|bell rang|woman sang|door closed|child laughed|cock crowed}.",
        "The {café|bakery|market} was {full|open|empty|noisy}, and {<people> {talked|laughed|drank <drink>|sat in the sun}|nobody was in a hurry}.",
        "<people> {hung out|carried|gathered|counted} their {nets|sheets|baskets|lanterns} and {spoke|talked|laughed} about the {weather|harvest|wind|river}.",
        "A {pale|clear|golden|soft|cold|warm} light lay on the {roofs|water|fields|stones}.",
        "{The <trees> bent|The reeds bent|The tall grass bent} {to the south|like a row of dancers|as if to say good day}.",
    ),
    "mind": (
        "<H> {loved|liked|knew} the sound of the {wind|river|rain|bells}, {because|for} it kept <H.him> company.",
        "<H> {thought|said to <H.himself>}: {it will be a {fine|long|good} day|perhaps the wind will {rest|sleep|turn} tonight|what a {strange|lovely} day this is}.",
        "<H> had a {warm|brave|stubborn|patient} heart and {two strong hands|a quick step|a good memory|a loud laugh}.",
        "{Now and then|From time to time|More than once}, <H> {looked up at the <sky_adj> sky|stopped to listen|sang an old song|rubbed <H.his> cold hands}.",
        "<H> {was|felt} a little <sad>, but {<H.he> did not say so|<H.he> kept walking|<H.he> smiled all the same}.",
        "<H.poss> grandmother {always|often} used to say: “<saying>.”",
        "<H> {ate|shared|cut} a piece of {bread|cheese|bread with honey} and {drank some water|looked at the hills|felt better}.",
        "<H> {remembered|thought of} {a song that <H.his> mother sang|the smell of <smell>|the long summer|the words of the old sailor}… and {smiled|sighed|hummed}.",
    ),
    "road": (
        "The road {went|climbed|wound} {up|on} {between the <trees>|past the old mill|over the dry hills|along the river}.",
        "{Beside|Along} the {road|path} there grew <herb>, and {bees|butterflies|crickets} were {busy|everywhere} in it.",
        "The {stones were|path was|steps were} {warm|wet|white with dust}, and the {wind|cierzo} {pushed|pulled} at <H.poss> coat.",
        "<H> and <F.name> {rested|sat down|stopped for a while} under a <tree> and ate <food> with <food>.",
        "They met <one_person> who {waved|greeted them|told them the news|wished them a good journey}.",
        "“{Are you tired|Is it far|Can you hear that|Do you see the river}?” {asked <F.name>|<F.name> asked}. “{Not at all|A little|Only a little|Yes, I think so},” said <H.name>.",
        "The <B> {ran ahead|stayed close|went in front|came behind}, and {its shadow was long on the ground|nothing could frighten it|it never made a sound}.",
        "{Step by step|Little by little|Hour after hour}, the {town|harbour|church tower} grew {smaller|smaller behind them}.",
        "A {hare|lizard|partridge} {crossed the path|looked at them|sat on a stone} and {was gone|vanished among the <herb>}.",
        "{The sun|A pale sun} {came out|stood high|hid behind a cloud}, and the {hills|fields|stones} {turned|became} <colour>.",
    ),
    "storm": (
        "The {wind|cierzo} <sound> {in the ropes|in the chimneys|like a wolf|like a hundred flutes} and would not {stop|rest|sleep}.",
        "{Rain|Hail|Dust} {beat on|fell on|flew against} the {roofs|windows|deck|walls}.",
        "A {shutter|gate|tile} {broke|fell|came loose} and {flew away|crashed on the stones|rolled down the street}.",
        "“Hold {on|tight|my hand}!” {cried|shouted|called} <F.name>.",
        "The {waves|clouds|shadows} were as {tall|dark|grey} as {houses|hills|the night}.",
        "<H> was {afraid|cold and wet|very tired}, but <H.he> {did not let go|did not turn back|thought of home}.",
        "The <B> {hid|shook|pressed itself} {behind a barrel|in a corner|against <H.poss> knees} and {closed its eyes|did not move}.",
        "{For a moment|For an hour|For a long time} {nobody spoke|nothing could be seen|there was only the wind}.",
        "Then {a bell rang in the dark|a light shone through the rain|the clouds broke for an instant}, and <H> {knew the way|took heart|pointed at it}.",
    ),
    "home": (
        "{Inside|In the kitchen|At home}, the {fire|stove|lamp} was {warm|bright|burning}, and it smelled of <food>.",
        "{On the table stood|They had|The neighbours brought} <food>, <food> and <drink> for {everybody|everyone|all}.",
        "“<saying>,” {said <F.name>|<F.name> said|said an old woman}, and {everyone|everybody} {laughed|nodded|agreed}.",
        "{One by one|Little by little}, the {stars came out|stars began to shine|lamps were lit|moon rose} over <town>.",
        "<F.name> {played|sang|hummed} {a slow song|an old song|a song about the sea}, and <people> {listened|clapped|danced|joined in}.",
        "The <B> {slept|lay down|curled up} {by the fire|under the table|at <H.poss> feet} and {dreamed of <food>|did not stir|was warm}.",
        "{Outside|Out there}, the {wind|cierzo} {had become|was now} {a whisper|a breath|soft and <soft_adj>}.",
        "<H> {was|felt} <mood> and {a little sleepy|not tired at all|full of songs}.",
        "“{Will you come back tomorrow|Shall we go again|Will you tell it once more}?” asked <F.name>. “{Of course|Yes, I will|As soon as the wind allows it},” <said> <H.name>.",
        "They {talked|laughed|sat together} {until late|for a long while|until the lamp went out}.",
    ),
}
