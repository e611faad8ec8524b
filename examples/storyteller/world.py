"""What the stories are made of: names, kinds of hero, settings, twists, themes and sentences.

Sentences take `{name}` and the other words that `stories.tell` fills in. Every sentence after
the opening says the hero's name rather than he or she, so any name goes with any kind.
"""

from __future__ import annotations

# fmt: off
GIRLS = (
    "Nora Mina Lila Tessa Ruby Hazel Willa Poppy Olive Clara Dora Elsa Fern Greta Holly Ida "
    "Juno Kira Luna Maya Nelly Opal Penny Rosa Stella Tilly Una Vera Wren Zoe Bella Daisy"
).split()
BOYS = (
    "Pip Milo Otto Finn Hugo Jasper Leo Max Ned Oscar Percy Quentin Rufus Sam Theo Victor "
    "Walter Ziggy Albert Bruno Casper Dexter Edgar Felix George Henry Ivan Jonas Kai Louis "
    "Barnaby Toby"
).split()
TRAITS = (
    "small brave shy curious gentle clumsy cheerful quiet patient dreamy clever kind sleepy "
    "careful stubborn"
).split()

# kind -> (a feature to describe, a way of moving)
KINDS = {
    "hedgehog": ("soft brown spines", "pattered"),
    "rabbit": ("long velvet ears", "hopped"),
    "fox": ("bright red tail", "trotted"),
    "owl": ("round golden eyes", "flew"),
    "mouse": ("tiny pink nose", "scurried"),
    "bear": ("big furry paws", "ambled"),
    "otter": ("sleek wet whiskers", "slid"),
    "squirrel": ("fluffy grey tail", "skipped"),
    "turtle": ("shiny green shell", "plodded"),
    "duckling": ("yellow feathers", "waddled"),
    "dragon": ("small silver wings", "fluttered"),
    "robot": ("blinking blue lights", "rolled"),
    "kitten": ("striped orange fur", "padded"),
    "puppy": ("floppy ears", "bounced"),
    "penguin": ("neat black coat", "waddled"),
    "badger": ("stripy snout", "shuffled"),
    "frog": ("wide happy smile", "leaped"),
    "lamb": ("woolly white coat", "skipped"),
    "bat": ("soft dark wings", "glided"),
    "snail": ("curly little shell", "crept"),
    "wizard": ("tall pointed hat", "walked"),
    "sailor": ("blue woolen cap", "marched"),
    "gardener": ("muddy green boots", "strolled"),
    "baker": ("floury apron", "hurried"),
}

# setting -> (preposition, details)
SETTINGS = {
    "an old lighthouse by the sea": (
        "in",
        "The waves whispered against the rocks below.",
        "Every night the great lamp turned slowly and painted the water gold.",
        "The stairs went round and round, and each step had its own creak.",
    ),
    "a quiet forest": (
        "in",
        "Tall pines stood close together like old friends.",
        "Moss covered every stone, as soft as a pillow.",
        "Fireflies drifted between the trees like tiny lanterns.",
    ),
    "a village in the mountains": (
        "in",
        "The roofs were white with snow and the chimneys puffed all day.",
        "Bells rang from the little church whenever the mist came down.",
        "The path to the well was steep and full of pebbles.",
    ),
    "a floating island": (
        "on",
        "Clouds bumped softly against its shores.",
        "If you looked over the edge you could see birds flying far below.",
        "A rope bridge swayed between the orchard and the tower.",
    ),
    "a castle made of glass": (
        "in",
        "When the sun came up, the walls turned pink and orange.",
        "Every footstep rang like a small bell.",
        "At night the stars could be seen through every ceiling.",
    ),
    "a garden behind the school": (
        "in",
        "Beans climbed up the fence and roses leaned over the wall.",
        "A watering can sat by the gate, always half full.",
        "Bees hummed over the lavender until the light was gone.",
    ),
    "a ship made of paper": (
        "on",
        "Its sails were pages from an old song book.",
        "The hull rustled whenever the wind changed.",
        "A candle in a jar lit the deck when it grew dark.",
    ),
    "a train that runs at night": (
        "on",
        "The wheels sang clickety clack over the long bridges.",
        "Warm yellow light fell from its windows on the sleeping fields.",
        "The seats smelled of leather and peppermint.",
    ),
    "a library with a thousand doors": (
        "in",
        "Some doors were as small as a thimble, and some were taller than a tree.",
        "Ladders slid along the shelves all by themselves.",
        "The air smelled of old paper and cinnamon.",
    ),
    "a bakery on the corner": (
        "in",
        "The ovens glowed like little suns before dawn.",
        "Flour hung in the air like snow that had forgotten to fall.",
        "Rows of buns sat cooling on the window sill.",
    ),
    "a cave full of crystals": (
        "in",
        "Even one candle was enough to make a hundred rainbows.",
        "Water dripped somewhere, slow and steady as a clock.",
        "The walls hummed if you put your ear against them.",
    ),
    "a houseboat on the river": (
        "on",
        "It rocked gently whenever a heron landed on the roof.",
        "Ropes creaked and reeds rustled along the bank.",
        "A line of tiny socks hung between the mast and the door.",
    ),
    "a meadow under the moon": (
        "in",
        "The tall grass bent and rose like slow waves.",
        "Crickets played the same soft tune over and over.",
        "White flowers opened only after sunset there.",
    ),
    "a workshop full of clocks": (
        "in",
        "The clocks ticked together like a choir of crickets.",
        "A brass bird popped out every hour and bowed.",
        "Little wheels and springs lay in rows on the bench.",
    ),
    "a treehouse in the rain": (
        "in",
        "Drops tapped on the roof like careful fingers.",
        "A blanket hung where the door should have been.",
        "The ladder was slippery, and the leaves were shining.",
    ),
    "a farm at the edge of the hills": (
        "on",
        "Hay was piled up to the rafters of the barn.",
        "The old dog slept by the gate with one eye open.",
        "The wind smelled of apples and warm earth.",
    ),
    "a market on the moon": (
        "in",
        "Silver dust puffed up with every step.",
        "The stalls sold bottled echoes and slices of comet.",
        "Everybody walked in long, slow jumps.",
    ),
    "a town under the sea": (
        "in",
        "Bubbles rose past the windows like balloons.",
        "The lamps were jellyfish who did not mind the work.",
        "Seaweed curtains swayed in front of every door.",
    ),
    "an attic full of boxes": (
        "in",
        "Dust danced in the one thin beam of light.",
        "Each box had a label that nobody could read any more.",
        "The floorboards grumbled like sleepy grandfathers.",
    ),
    "a desert of singing sand": (
        "in",
        "When the wind blew, the dunes hummed a lullaby.",
        "The stars hung so low that they seemed within reach.",
        "A single palm tree stood beside a round blue pool.",
    ),
    "a hotel for lost toys": (
        "in",
        "Every room had a tiny bed and a tiny lamp.",
        "The lift was pulled up by a very patient wooden horse.",
        "Buttons and marbles were kept in a jar on the desk.",
    ),
    "a windmill on a green hill": (
        "in",
        "Its sails went round with a sound like slow breathing.",
        "Swallows had built a nest above the door.",
        "From the top window you could see three rivers.",
    ),
    "an island shaped like a boot": (
        "on",
        "The harbour was in the heel and the beach was at the toe.",
        "Crabs marched across the sand in neat little lines.",
        "A crooked flag marked the highest rock.",
    ),
    "a house with round windows": (
        "in",
        "The kettle was always just about to sing.",
        "Ivy tickled the walls and peeped in at the corners.",
        "A crooked stair led up to the warmest room.",
    ),
}

# twist -> ((foreshadowing, ...), (aftermath, ...)). A twist carries its own, because that is where
# a story made of unrelated parts stops making sense.
TWISTS = {
    "the monster was a hungry kitten": (
        ("One evening a terrible growl came out of the dark.",
         "Something with shining eyes was growling in the shadows."),
        ("{name} warmed a bowl of milk, and soon the growl turned into a purr.",
         "The kitten drank some milk and curled up next to {name}."),
    ),
    "the storm was a snoring giant": (
        ("One night the whole place shook with thunder, but there was not a drop of rain.",
         "A deep rumble rolled over the roof again and again."),
        ("{name} tucked a cloud under the giant's head, and the rumbling stopped.",
         "The giant said sorry and rolled over, and everything was still."),
    ),
    "the treasure was a box of letters": (
        ("One morning {name} found a map with a red cross on it.",
         "An old map fell out of a book and pointed to a hidden treasure."),
        ("The letters told of friends who had never forgotten each other.",
         "{name} read every letter aloud until the candle burned low."),
    ),
    "the ghost was a bed sheet": (
        ("Something white floated past the window without a sound.",
         "After dark a pale shape waved its arms and said nothing at all."),
        ("{name} laughed and folded it neatly for the morning.",
         "The wind let go, and {name} hung the sheet back on the line."),
    ),
    "the thief was a magpie": (
        ("One by one, all the spoons began to vanish.",
         "Every morning another shiny button was missing."),
        ("The bird only wanted something bright, so {name} gave it a silver bell.",
         "{name} built the magpie a nest of ribbons, and the lost things came home."),
    ),
    "the map was upside down": (
        ("{name} had a map, but every path led the wrong way.",
         "The map said left, yet left was only a wall."),
        ("{name} turned it around, and the way home was suddenly easy.",
         "Once it was turned around, the path was as plain as day."),
    ),
    "the star was a lost firefly": (
        ("A star had fallen and lay blinking on the ground.",
         "One small star seemed to be stuck much too low in the sky."),
        ("{name} carried it back to its family, and they all lit up with joy.",
         "The firefly danced a thank you and flew off to its friends."),
    ),
    "the voice was an echo": (
        ("Somebody kept repeating every word that {name} said.",
         "A strange voice answered from far away whenever {name} called."),
        ("So {name} called out something kind, and something kind came back.",
         "{name} sang a lullaby, and the echo sang it twice."),
    ),
    "the dragon was afraid of the dark": (
        ("A dragon had moved in, and everybody was afraid of it.",
         "Puffs of smoke rose up all night, and people whispered about a dragon."),
        ("{name} lent it a little lamp, and the dragon smiled for the first time.",
         "From then on {name} and the dragon shared one night light."),
    ),
    "the key had been in the pocket all along": (
        ("The key was gone, and the door would not open.",
         "{name} looked everywhere for the small brass key."),
        ("{name} laughed so hard that the door nearly opened by itself.",
         "Everyone giggled, and the door swung open at last."),
    ),
    "the stranger was the king": (
        ("A stranger in a muddy coat knocked and asked for soup.",
         "A tired stranger asked if there was a place to rest."),
        ("He thanked {name} and gave a feast for everyone.",
         "The king never forgot the warm soup that {name} had made."),
    ),
    "the egg held a tiny cloud": (
        ("{name} found a blue egg that hummed when it was held.",
         "A strange blue egg lay in the grass, as light as air."),
        ("The cloud rained a little from happiness and watered all the flowers.",
         "It floated up to the sky and waved to {name} with a soft drizzle."),
    ),
    "the moon had only been hiding": (
        ("One night the moon did not come up at all.",
         "Everyone looked up, but the sky had lost its moon."),
        ("It peeped out from behind a cloud and called, found me!",
         "{name} counted to ten, and the moon hid once more, just for fun."),
    ),
    "the race was won by the slowest": (
        ("There was to be a big race, and everyone boasted of being fast.",
         "A race was announced, with a golden cup for the winner."),
        ("The others had stopped to argue, and nobody had minded the road.",
         "{name} clapped the loudest of all."),
    ),
    "the statue could talk": (
        ("An old stone statue seemed to follow {name} with its eyes.",
         "Somebody sneezed, but there was nobody there except a statue."),
        ("It had been waiting a hundred years for someone to say hello.",
         "It told {name} a story about the sea and then asked for another."),
    ),
    "the old boat could fly": (
        ("Nobody wanted the old boat, for it was full of holes.",
         "An old boat lay forgotten, and {name} began to mend it."),
        ("Up it rose over the treetops, with {name} at the wheel.",
         "{name} held on tight as they sailed past the evening star."),
    ),
    "the soup was made of music": (
        ("A wonderful smell drifted by, and it sounded like a violin.",
         "A big pot was bubbling, and every bubble popped with a different note."),
        ("{name} took one spoonful and could not stop humming.",
         "Everyone had a bowl, and the whole place sang in tune."),
    ),
    "the shadow wanted a friend": (
        ("A shadow was there that belonged to nobody.",
         "Each evening a long shadow waited by the door."),
        ("{name} waved, and the shadow waved back with both arms.",
         "They played shadow puppets until it was time for bed."),
    ),
    "the wish had already come true": (
        ("{name} found an old coin that could grant one wish.",
         "A shooting star gave {name} one single wish."),
        ("So {name} kept the wish safe for someone who might need it more.",
         "{name} looked around at all the friends and needed nothing else."),
    ),
    "the river was running backwards": (
        ("One day every leaf on the water floated the wrong way.",
         "The fish looked puzzled, and so did the ducks."),
        ("It had only gone back to fetch a pebble that it had dropped.",
         "{name} asked it politely to turn around, and it did."),
    ),
    "the mountain was asleep": (
        ("The ground went up and down, up and down, ever so slowly.",
         "Something very large was breathing under the stones."),
        ("{name} tiptoed all the way home so as not to wake it.",
         "{name} whispered good night to it and spread a blanket of leaves."),
    ),
    "the wolf was a baker": (
        ("There were large paw prints by the door, and everybody locked up early.",
         "A wolf had been seen, and nobody dared to go out."),
        ("He had only been leaving warm bread on every doorstep.",
         "He invited {name} in for honey cakes, and they were the best in the land."),
    ),
    "the mirror showed tomorrow": (
        ("{name} wiped the dust off an old mirror and blinked.",
         "In the old mirror, the room did not look quite the same."),
        ("And tomorrow, {name} saw, was going to be a very good day.",
         "{name} covered it with a cloth, for surprises are nicer."),
    ),
    "the snow was made of feathers": (
        ("It began to snow in the middle of summer.",
         "White flakes were falling, but they were not cold at all."),
        ("High above, a goose was shaking out her pillows and said sorry.",
         "{name} gathered them up and made a pillow for everyone."),
    ),
}

# theme -> (wants, middles, lessons)
THEMES = {
    "courage": (
        ("{name} wanted to be brave, but it was not always easy.",
         "{name} was a little afraid of many things."),
        ("{name} took a deep breath and went closer, one step at a time.",
         "With a thumping heart, {name} went to see what it was.",
         "{name} was frightened, and went anyway."),
        ("{name} had learned that being brave means being scared and going on.",
         "Courage, {name} found, can be very small and still be enough."),
    ),
    "kindness": (
        ("{name} liked to do small good things that nobody noticed.",
         "{name} always kept a spare biscuit for someone who needed it."),
        ("{name} thought that somebody might need help, and went to look.",
         "Instead of running away, {name} asked in a friendly voice, can I help?",
         "{name} brought a warm blanket along, just in case."),
        ("{name} had learned that a little kindness goes a long way.",
         "A kind word, {name} found, can open any door."),
    ),
    "patience": (
        ("{name} never liked to wait for anything.",
         "{name} was learning how to wait."),
        ("{name} sat down, counted to a hundred, and watched.",
         "It took a long while, but {name} did not give up.",
         "{name} waited quietly until the time was right."),
        ("{name} had learned that good things are worth waiting for.",
         "Slowly, {name} found, is sometimes the fastest way."),
    ),
    "sharing": (
        ("{name} had a bag of sweet berries and did not want to share them.",
         "{name} had one warm scarf and many cold friends."),
        ("{name} broke the last piece of cake in two and held out half.",
         "{name} thought about it, and then shared the lantern with the others.",
         "There was only one cup of cocoa, so {name} fetched two spoons."),
        ("{name} had learned that things grow bigger when they are shared.",
         "Half a cake with a friend, {name} found, tastes better than a whole one alone."),
    ),
    "friendship": (
        ("{name} wished for a friend to play with.",
         "{name} knew everybody, but had no best friend yet."),
        ("{name} called the neighbours, and they went to look together.",
         "A little sparrow came along, so {name} was not alone.",
         "Side by side with a new friend, {name} went on."),
        ("{name} had learned that a friend can be found in the oddest place.",
         "With a friend, {name} found, even the dark is not so dark."),
    ),
    "honesty": (
        ("{name} had broken a blue cup and had told nobody.",
         "{name} sometimes told stories that were not quite true."),
        ("{name} decided to tell the truth about what had happened.",
         "{name} said out loud, I do not know, let us find out.",
         "It would have been easy to fib, but {name} did not."),
        ("{name} had learned that the truth makes the heart light.",
         "A true word, {name} found, is easier to carry than a fib."),
    ),
    "curiosity": (
        ("{name} asked a hundred questions a day.",
         "{name} wanted to know how everything worked."),
        ("{name} wondered and wondered, and then went to look.",
         "How strange, thought {name}, and looked a little closer.",
         "{name} followed the clues, one after the other."),
        ("{name} had learned that every question is a small door.",
         "The best way to stop being afraid, {name} found, is to ask why."),
    ),
    "gratitude": (
        ("{name} often forgot to say thank you.",
         "{name} always wished for bigger and better things."),
        ("{name} thought of all the good things of the day and felt braver.",
         "{name} thanked the lantern for its light and went to look.",
         "{name} remembered a warm bed and felt lucky."),
        ("{name} had learned to be thankful for small things.",
         "Saying thank you, {name} found, makes a good day twice as good."),
    ),
}

OPENINGS = (
    "Once upon a time, {prep} {setting}, there lived {a_trait} {kind} named {name}.",
    "{Prep} {setting} there once lived {a_trait} {kind} called {name}.",
    "Long ago, {prep} {setting}, lived {name}, {a_trait} {kind}.",
    "There was once {a_trait} {kind} named {name}, who lived {prep} {setting}.",
)
FEATURES = (
    "{name} had {feature} and a very warm heart.",
    "Everybody knew {name} by the {feature}.",
    "With {feature} and a merry laugh, {name} was easy to like.",
)
SCENES = (
    "On the way, {name} met an old snail who said, take your time, little one.",
    "A gust of wind blew out the lantern, so {name} followed the light of the stars.",
    "{name} {moved} past the well, past the crooked fence, and past the sleeping geese.",
    "A moth landed on {name} and whispered, you are nearly there.",
    "It was so quiet that {name} could hear the clouds go by.",
    "{name} {moved} under a low branch and over a small puddle.",
    "Twice {name} wanted to turn back, and twice {name} went on.",
    "Far away a bell rang nine times, and {name} counted every one.",
)
REVEALS = (
    "And what a surprise: {twist}!",
    "Then {name} saw the truth: {twist}.",
    "And then, all at once, it was clear that {twist}.",
    "Who would have thought it? It turned out that {twist}.",
)
FEELINGS = (
    "{name} laughed until the tears came.",
    "{name} smiled from ear to ear.",
    "For a moment {name} could not say a word.",
    "{name} felt warm all the way down to the toes.",
)
EVENINGS = (
    "When the sun went down, everybody came to hear about it.",
    "That evening there was hot cocoa for everyone.",
    "Later the lamps were lit, one after the other.",
    "The wind grew soft, and the first stars came out.",
)
CLOSINGS = (
    "Then {name} yawned, closed both eyes, and fell asleep. Good night.",
    "That night {name} slept soundly, and so should you. Good night.",
    "And with a happy sigh {name} went to bed. Sleep well.",
    "The moon looked in, and {name} was already dreaming. Good night.",
)
