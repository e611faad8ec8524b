// What a story can be about: what the storyteller knows (examples/storyteller/world.py), and its prompt.

export const NAMES = [
  "Nora", "Ruby", "Olive", "Fern", "Juno", "Nelly", "Stella", "Wren", "Pip", "Hugo", "Ned", "Rufus",
  "Walter", "Casper", "George", "Kai",
];
export const KINDS = [
  "hedgehog", "rabbit", "fox", "owl", "mouse", "bear", "otter", "squirrel", "turtle", "duckling",
  "dragon", "robot", "kitten", "puppy", "penguin", "badger", "frog", "lamb", "bat", "snail",
  "wizard", "sailor", "gardener", "baker",
];
export const SETTINGS = [
  "an old lighthouse by the sea", "a quiet forest", "a village in the mountains",
  "a floating island", "a castle made of glass", "a garden behind the school",
  "a ship made of paper", "a train that runs at night", "a library with a thousand doors",
  "a bakery on the corner", "a cave full of crystals", "a houseboat on the river",
  "a meadow under the moon", "a workshop full of clocks", "a treehouse in the rain",
  "a farm at the edge of the hills", "a market on the moon", "a town under the sea",
  "an attic full of boxes", "a desert of singing sand", "a hotel for lost toys",
  "a windmill on a green hill", "an island shaped like a boot", "a house with round windows",
];
export const TWISTS = [
  "the monster was a hungry kitten", "the storm was a snoring giant",
  "the treasure was a box of letters", "the ghost was a bed sheet", "the thief was a magpie",
  "the map was upside down", "the star was a lost firefly", "the voice was an echo",
  "the dragon was afraid of the dark", "the key had been in the pocket all along",
  "the stranger was the king", "the egg held a tiny cloud", "the moon had only been hiding",
  "the race was won by the slowest", "the statue could talk", "the old boat could fly",
  "the soup was made of music", "the shadow wanted a friend", "the wish had already come true",
  "the river was running backwards", "the mountain was asleep", "the wolf was a baker",
  "the mirror showed tomorrow", "the snow was made of feathers",
];
export const THEMES = [
  "courage", "kindness", "patience", "sharing", "friendship", "honesty", "curiosity", "gratitude",
];
export const LENGTHS = [
  "short", "medium", "long",
];

// The user's turn. A name is letters, spaces, hyphens and apostrophes, so no name can spell a token
// that begins or ends a turn.
export function promptOf({name, kind, setting, twist, theme, length}) {
  const plain = name.replace(/[^\p{L}\p{M}' -]/gu, "").trim().slice(0, 24) || "Pip";
  return `Tell me a bedtime story.\nHero: ${plain} the ${kind}\nSetting: ${setting}\nTwist: ${twist}\n` +
    `Theme: ${theme}\nLength: ${length}`;
}
