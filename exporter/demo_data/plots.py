"""The plots of the demo's stories: paragraphs of beats, in the notation of :mod:`exporter.demo_data.grammar`.

A paragraph names the group of filler sentences that suits its scene and lists its beats in order; every story of a plot
tells all of them and differs in words, alternatives, names and the sentences between.
"""

from __future__ import annotations

from typing import NamedTuple


class Paragraph(NamedTuple):
    """`scene`: names of the filler groups (keys of ``FILLERS``); `beats`: sentences in the order of the telling."""

    scene: tuple[str, ...]
    beats: tuple[str, ...]


OPENING = Paragraph(
    ("day", "mind"),
    (
        "{{Once upon a time|Long ago|Many years ago|One <season>|One windy <season>}, {there lived in <town> a <H.job>|a <H.job> lived in <town>|there was a <H.job> in <town>} {called|named|whose name was} <H.name>|One windy {morning|afternoon|evening}, <H.name> {opened the door|woke early|came home|went down to the river}. <H.He> was a <H.job> {in <town>|from <town>|who lived in <town>}}.",
        "<H> {lived|worked} in a <house_adj> house {near|beside|behind|opposite} the <part_of_town>, {together with|with} a {small|young|clever|lazy|<colour>} <B> {that followed <H.him> everywhere|that was never far away|that nobody else wanted|that had come one day with the wind}.",
        "{Every <day_time>|On most days|As a rule}, <H> {opened the window|got up early|went out before the bells rang|swept the step} and {looked at the <sky_adj> sky|listened to the wind|wished the river a good day|greeted <people>}.",
        "{<H.poss> best friend was|<H.name> had a friend,} <F.name> the <F.job>, {who|and <F.he>} {lived across the street|lived <in_town>|had a {good|kind|brave|patient|honest} heart|could make anybody laugh}.",
        "{But the thing that <H.name> loved most was|What <H.name> loved most of all was|Above everything, <H.name> loved} <H.his> <thing>, {a gift from <H.his> {mother|father|grandmother|uncle}|which had once belonged to a sailor|which hung on a nail by the door}.",
    ),
)

PLOTS: dict[str, tuple[Paragraph, ...]] = {
    "lost": (
        Paragraph(
            ("day", "storm"),
            (
                "{One <day_time>|One day in <month>|Then, one <day_time>}, {the cierzo|a <wind_adj> wind|the north wind} {came down the valley|blew into <town>|woke before the sun}.",
                "It <sound> in the {chimneys|towers|streets} and <shook> all the <house_thing>.",
                "<H> {went out|stepped outside|opened the door} with <H.his> <thing> — and {in an instant|at once|before <H.he> could blink} the wind {took it|carried it away|snatched it from <H.his> hands}!",
                "“{Stop|Come back|Give it back|Oh no}!” {cried|shouted|called} <H.name>, but the <thing> {flew|rolled|sailed} {over the roofs|across the square|past the church tower|over the bridge} and {was gone|could not be seen any more}.",
                "<H> {sat down on a stone|stood in the empty street|looked up at the <sky_adj> sky} and {felt very <sad>|did not know what to do|almost cried}.",
                "{Then|Just then} <F.name> came {along the street|out of the café|round the corner}. “{What is the matter|Why are you so sad|What happened}?” <F.he> asked.",
                "“The wind has {taken|stolen} my <thing>,” said <H.name>. “{Then let us look for it|Then we shall find it|Come, we will look for it together},” said <F.name>.",
            ),
        ),
        Paragraph(
            ("road",),
            (
                "So the two friends {took some <food>|put on their coats|called the <B>} and {followed the wind|left the town|set out} {along the river|through the fields|over the hills}.",
                "{First|At first} they {asked|spoke to} <one_person>. “{Have you seen|Did you see} a <thing>?” “{No|I am sorry, no|Not today},” was the answer, “but {ask at the mill|the wind went south|look among the <trees>}.”",
                "{Then they|After that they|Next they} looked {behind the mill|under the bridge|in the old tower|by the canal}, but {there was nothing|they found only leaves|they found only a sleeping cat} there.",
                "{At last|In the end|When the sun was low}, the <B> {stopped|began to call|lifted its head} and {looked up|would not go on}.",
                "There, high in a <tree>, {hung|was} the <thing>, {safe and dry|a little dusty|between two branches|next to an empty nest}!",
                "<F.name> {held the branch|lifted <H.him> up|brought a ladder}, and <H> {climbed up|reached for it|took it down} <how>.",
            ),
        ),
        Paragraph(
            ("home",),
            (
                "{On the way home|When they came back|That evening}, the wind {was quiet|had fallen|blew softly at their backs}.",
                "<H> {held|carried} the <thing> {with both hands|close to <H.his> heart|under <H.his> coat} and {would not let it go|laughed all the way|thanked <F.name> three times}.",
                "“{You see|I told you so}!” said <F.name>. “{The wind only wanted to play|The cierzo is a thief, but an honest one|Nothing is lost while somebody looks for it}.”",
                "{From that day on|Since then|Ever after}, <H> {tied the <thing> with a string|kept the window closed|waved to the wind} {whenever|each time} the cierzo blew, {and they stayed friends for ever|and all was well|and nobody in <town> was sad for long}.",
            ),
        ),
    ),
    "sea": (
        Paragraph(
            ("day", "mind"),
            (
                "{One <day_time>|One day in <month>|On the first day of <season>}, <H> {went down to the harbour|walked to the wharf|packed a basket with <food>}, {for|because} <H.he> {wanted to see the sea|had a letter to carry to the islands|had promised <food> to an aunt by the sea}.",
                "There lay a {small|<colour>|good old} <boat> with a <colour> sail, and <F.name> {was tying the ropes|was mending the net|sat on the deck}.",
                "“{Will you take me with you|Where are you going|Is there room for one more}?” asked <H.name>. “{Come aboard|Jump in|There is always room for a friend},” said <F.name>, “but {watch the sky|hold on to your <thing>|the wind is not in a good mood today}.”",
                "They {raised|set|hoisted} the sail, and the <boat> {slid|glided|went} {down the river|past the last houses|under the bridge} {towards|to} the sea.",
                "The {water|sea} was {flat and blue|bright as glass|full of little lights}, and {gulls|dolphins|white birds} {followed them|showed them the way}.",
            ),
        ),
        Paragraph(
            ("storm",),
            (
                "{But at noon|But towards evening|Then, all at once}, the sky {turned grey|grew dark|went black}, and {the cierzo|a <wind_adj> wind} {fell upon the sea|came <far>|began to blow}.",
                "The <boat> {rolled|jumped|danced} {like a nut|like a cork|like a goat} on the {waves|water}, and the sail {tore|broke loose|cracked like a whip}.",
                "“{Take the rudder|Bring down the sail|Take the rope}!” {shouted|called|cried} <F.name>, and <H> {did it at once|pulled with all <H.his> strength|obeyed}.",
                "{Water|A great wave} {came over the side|filled the deck|took the oars}, and {they had to throw out|out went} the {barrels|nets|baskets}.",
                "Then <H> {remembered|thought of} <H.his> <thing>. <H.He> {lifted it high|tied it to the mast|held it up in the wind} {so that somebody might see it|and hoped|and called for help}.",
                "{On the shore|In the lighthouse}, <one_person> {saw it|understood} and {lit a great fire|rang the bell|raised a lantern}.",
                "“{There|Look}! {A light|The harbour}!” <said> <H.name>. “{Steer for it|Straight ahead|Now we are saved},” said <F.name>.",
            ),
        ),
        Paragraph(
            ("home",),
            (
                "{When the moon rose|At midnight|Before the morning came}, the <boat> {came into|reached} the harbour, {wet and tired|with a torn sail|slow as a snail}, but {whole|safe}.",
                "{All <town>|Half the town} {stood on the wharf|had come with lanterns|was waiting}, and <people> {brought <food>|brought dry coats|cheered}.",
                "“{Were you afraid|Was it terrible|What was it like}?” {asked a child|a child asked}. “{Yes|Very much|Of course},” said <H.name>, “but {<F.name> was with me|we were two|the light was stronger than the wind}.”",
                "{The next day|In the morning}, they {mended the sail|painted the <boat> <colour>|thanked the keeper of the light}, and {hung the <thing> on the mast|gave the <boat> a new name|sang as they worked}.",
                "And {when the wind blows|on windy nights|whenever the cierzo blows}, {the sailors of <town>|people in <town>} still {tell|remember} {how <H.name> and <F.name> came home|the story of the <thing> and the light}.",
            ),
        ),
    ),
    "mill": (
        Paragraph(
            ("day", "mind"),
            (
                "{That <season>|One <season>|One dry <season>}, {a strange thing happened|something odd happened|there was trouble}: the wind {stopped|fell asleep|went away}.",
                "For <count> {days|weeks} {not a leaf moved|the flags hung down|the sails of the mill stood still}, and {without wind there was no flour|the miller had nothing to do}.",
                "Without flour there was no bread, and <people> {began to worry|shook their heads|looked at the empty ovens}.",
                "“{Where has the wind gone|Why does the wind not blow|Who has seen the wind}?” {they asked|everyone asked} <in_town>.",
                "“{Perhaps it is asleep in the mountains|Perhaps somebody was rude to it|Perhaps it is ill},” said <F.name>. “{Somebody should go and ask|Somebody must wake it}.”",
                "“{Then I will go|I shall go},” said <H.name>, “and {you will come with me|I will take my <thing>|I will bring it some <food>}.”",
            ),
        ),
        Paragraph(
            ("road",),
            (
                "{The next <day_time>|Early in the morning|Before sunrise} <H> and <F.name> {left|set out}, with {bread|<food>} in a bag and the <B> {at their side|on a rope|behind them}.",
                "{They <walked> for <count> {hours|days}|They followed the river|They crossed the dry plain} until they {came to|stood before|saw} {a great grey mountain|a cave in the rocks|a hill without trees}.",
                "{At the top|Up there|Inside}, in the {shadow|silence}, {lay|sat|slept} the cierzo, {as grey as an old wolf|thin as smoke|like a heap of blue cloth}.",
                "“{Good day, wind|Wake up, wind|Dear wind},” said <H.name> <how>. “{Why do you sleep?|Are you ill?|The mill is waiting for you.}”",
                "“I am {tired|sad},” <sound> the wind. “{Everybody closes the door when I come|Nobody is glad to see me|They call me a thief}.”",
                "“{But we need you|That is not true|I am glad to see you},” said <H.name>. “{You turn the mill and dry the sheets|You bring the rain and the birds|Without you there is no bread}. {Take|Look, I give you} my <thing>.”",
                "The wind {took|touched|turned over} the <thing>, {laughed|smiled|grew a little} and {stood up|shook itself|began to blow}.",
            ),
        ),
        Paragraph(
            ("home",),
            (
                "How they {flew|ran|laughed} {down the hill|on the way home}! The wind {was always behind them|carried their hats|pushed them like two leaves}.",
                "{In <town>|Down in the valley}, the {sails of the mill|great wheels of the mill} {began to turn|creaked and turned|turned and turned}, and {white flour|new flour} {ran|fell} into the sacks.",
                "{That night|In the evening}, {there was fresh bread for all|the ovens were hot again|the whole town smelled of bread}.",
                "{The first loaf|The best loaf|A warm loaf} was {for <H.name>|put on the hill, for the wind|cut into <count> pieces}.",
                "And {since then|from that day on}, when the cierzo knocks, {people open the window a little|nobody in <town> complains|they say “good day, old friend”}.",
            ),
        ),
    ),
    "wing": (
        Paragraph(
            ("day", "mind"),
            (
                "{One <day_time>|One <day_time> in <month>|After a night of wind}, <H> {found|saw} a {young|small|grey} {bird|stork|swallow|gull} {on the step|under the <tree>|among the reeds|beside the fountain}.",
                "It {could not fly|held one wing low|lay quite still}, and {its eyes were bright with fear|it was as light as a leaf|its heart beat fast}.",
                "“{Poor little thing|Do not be afraid|Hush},” said <H.name>. “The wind {was too strong for you|has treated you badly|threw you down}.”",
                "<H> {wrapped it in a cloth|took it up <how>|put it in a basket} and {carried it|brought it} to <F.name>, {who knew about birds|who always knew what to do}.",
                "“{The wing is not broken|It needs rest|It only needs time},” said <F.name>. “{Give it water and seeds|Keep it warm|Let it sleep near the fire}.”",
            ),
        ),
        Paragraph(
            ("mind", "home"),
            (
                "For <count> {days|weeks} the bird {lived|stayed} in {the kitchen|a box by the stove|a basket by the window}.",
                "{At first|In the beginning} the <B> {was jealous|did not like this at all|looked at it with big eyes}, but {soon|after a while} {they slept side by side|they were friends|it brought the bird crumbs}.",
                "{Every <day_time>|Each morning} <H> {gave it seeds|fed it <food>|told it the news} and {sang to it|stroked its back|moved its wing up and down}.",
                "<H.He> even {made it a nest {out of|beside}|let it sleep {beside|on}} <H.his> <thing>.",
                "{One <day_time>|Then, one <day_time>}, the bird {hopped on the table|opened both wings|flew from the chair to the door} — {once, twice, three times|and did not fall}!",
                "“{It is time|It wants to go home},” said <F.name> <how>. “I know,” said <H.name>, and <H.he> {was <mood> and sad at once|swallowed hard|looked out of the window}.",
            ),
        ),
        Paragraph(
            ("road", "mind"),
            (
                "{Together|The next <day_time>|On a clear <day_time>} they {<walked> up the hill|climbed the tower|went to the bridge}, where the {cierzo|wind} {was strong|blew day and night}.",
                "<H> {opened <H.his> hands|opened the basket|lifted it up}. “{Fly|Go on|Go now},” <H.he> said, “{the wind is your friend today|and do not forget us|and come back in spring}.”",
                "The bird {waited|looked at <H.him>|shook its feathers}… and {flew|rose|was gone}, {higher than the tower|over the river|into the <sky_adj> sky}.",
                "{For a long time|For a while} <H> and <F.name> {stood there|said nothing|watched it}, until it was {a dot|a speck|no bigger than a seed}.",
                "{In spring|The next <season>|A year later}, {when the <trees> were in flower|on a windy morning}, {somebody knocked at the window|there was a sound at the window}.",
                "It was the bird, and {it was not alone|with it came <count> others}! {“Welcome home,” said <H.name>|<H.name> laughed for joy|<H.name> opened the window wide}.",
            ),
        ),
    ),
    "feast": (
        Paragraph(
            ("day", "mind"),
            (
                "{In <month>|Every <season>|At the end of <season>}, <town> {held|had|kept} a feast {for the wind|for the river|of lanterns|of the kites}, and {this year|this time} <H> {was to open it|wanted to win the prize|had promised a surprise}.",
                "{For <count> days|For <count> weeks} <H> {worked|sang|sewed and painted} {until late|behind a closed door|by the light of a lamp}, and {told nobody why|only the <B> was allowed to look}.",
                "“What are you {making|doing|hiding} in there?” <asked> <F.name>. “{You will see|Wait and see|It is a secret},” <said> <H.name>.",
                "<F.name> {laughed|shook <F.his> head|went away} and {baked <count> cakes|bought <food>|cleaned the lanterns} {for the feast|for the guests}.",
                "Guests came from {Zaragoza|Caspe|Tortosa|the islands|the mountains}, {on foot|by <boat>|with carts and donkeys}, and the café {was full|had no chair left|sold all its <food>}.",
            ),
        ),
        Paragraph(
            ("storm", "mind"),
            (
                "{But on the great day|But when the day came|On the morning of the feast}, the {cierzo|wind} blew as it had not blown for {many|<count>} years.",
                "It {threw down|carried off|tore} the {flags|tables|tents}, and {put out|blew out} {the lamps|every lantern}.",
                "“{We must stop|There can be no feast|Everything is ruined},” said <people>, and {the children cried|the drums fell silent|some went home}.",
                "<H> {looked at|listened to} the wind and {thought hard|then began to laugh|had an idea}. “{Wait|Listen|Do not go}!” <H.he> called. “{The wind is our guest|The feast is for the wind, so let it come in|Let us give it something to play with}!”",
                "<H> {brought out|ran home and fetched|took} the <thing>, and {tied it to a long string|tied it to the highest tower|held it up}; and the wind {seized it|took it} and {made it sing|let it dance|carried it high over the square}.",
                "“{Oh|Ah|Look}!” {cried|called} {the children|everyone|<F.name>}. “{The wind is playing|The wind can dance|It is beautiful}!”",
            ),
        ),
        Paragraph(
            ("home",),
            (
                "{Soon|Before long} {everybody had|each child had} {a ribbon|a flag|a kite} {on a string|in the air}, {and the sky was full of colours|red, blue and golden}.",
                "{The drums began again|Somebody played the flute|The bells rang}, and <people> danced {until the moon rose|with the wind|round the fountain}.",
                "“{You have saved the feast|This was the best feast of all|So that was your secret},” said <F.name>. “{No|Not I|Oh no},” said <H.name>, “{it was the wind|I only opened the door|it was everyone}.”",
                "{At midnight|When it was late}, the {cierzo|wind} {grew quiet|lay down|went to sleep}, and {laid the <thing> at <H.poss> feet|left a feather on <H.poss> sleeve}.",
                "And {if you come to <town>|to this day} {in <month>|when the wind is high}, {you will hear them sing about it|you can see the kites over the river}.",
            ),
        ),
    ),
}
