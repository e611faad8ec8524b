// A story's cover: an SVG drawn from what was chosen and the seed, and from nothing else.
import {gumbel} from "./sampler.js";

const SKIES = ["#27306b #8a6fb8", "#1d3b5c #7fa8b8", "#3a2b5e #d58a7a", "#20344f #a0a8d8"];
const COATS = {hedgehog: "#8a6a4f", fox: "#d8713c", frog: "#6fa65a", penguin: "#3d4660", robot: "#9aa8b8",
  dragon: "#5f9f86", kitten: "#dd9a52", lamb: "#e8e2d6", bat: "#5a4a6a", owl: "#9a7a5a", duckling: "#ecc94b"};
const EARS = {rabbit: [9, 34], fox: [12, 20], kitten: [12, 16], bat: [14, 22], dragon: [8, 18], owl: [9, 12],
  wizard: [30, 46], squirrel: [10, 16]};
// what stands on the hill, by a word of the setting
const LANDMARKS = [
  [/lighthouse|windmill|castle|clocks|tower/, '<path d="M0 0h34l-6-90h-22z"/><path d="M2-90h30l-15-24z"/><circle cx="17" cy="-74" r="6" fill="#ffe9a8"/>'],
  [/ship|boat|island|sea/, '<path d="M-20-22h90l-16 22h-58z"/><path d="M22-28v-66l38 60z"/>'],
  [/forest|garden|treehouse|meadow|farm/, '<path d="M-24 0l24-80 24 80zM26 0l20-62 20 62z"/>'],
  [/mountain|cave|desert|hill/, '<path d="M-70 0l60-96 34 46 22-26 54 76z"/>'],
  [/./, '<path d="M-20 0v-46l36-30 36 30v46z"/><rect x="6" y="-36" width="18" height="18" fill="#ffe9a8"/>'],
];

export function cover({name, kind, setting, theme, seed}) {
  let drawn = 0; // numbers from 0 to 1, the same for a seed
  const random = () => Math.exp(-Math.exp(-gumbel(seed, drawn++)(7)));
  const [high, low] = SKIES[(theme.length + Math.floor(random() * 4)) % 4].split(" ");
  const stars = Array.from({length: 30}, () =>
    `<circle cx="${(random() * 480).toFixed()}" cy="${(random() * 130).toFixed()}" r="${(0.6 + random()).toFixed(1)}"/>`).join("");
  const moon = 60 + Math.floor(random() * 340), hill = 200 + Math.floor(random() * 20);
  const landmark = LANDMARKS.find(([words]) => words.test(setting))[1];
  const [width, height] = EARS[kind] ?? [10, 10], coat = COATS[kind] ?? "#a58264";
  const ear = (side) => `<path d="M${side * 16 - width / 2} -52l${width / 2} ${-height} ${width / 2} ${height}z"/>`;
  const spikes = kind === "hedgehog" ? `<path d="${star(15, 44, 34)}" transform="translate(0 -24)" fill="#5a4433"/>` : "";
  const hero = `<g transform="translate(330 ${hill + 38})" fill="${coat}">${spikes}${ear(-1)}${ear(1)}
    <ellipse cy="-14" rx="26" ry="24"/><circle cy="-44" r="22"/><g fill="#1b1b2b"><circle cx="-8" cy="-46" r="3"/><circle cx="8" cy="-46" r="3"/><ellipse cy="-37" rx="4" ry="2.5"/></g></g>`;
  const title = `${name} the ${kind}`.replace(/[<&>"]/g, "");
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 300" role="img" aria-label="Cover: ${title}, ${setting}">
    <defs><linearGradient id="sky" x2="0" y2="1"><stop stop-color="${high}"/><stop offset="1" stop-color="${low}"/></linearGradient></defs>
    <rect width="480" height="300" fill="url(#sky)"/><g fill="#fff">${stars}</g>
    <path d="M${moon} 58a26 26 0 1 0 26 34a22 22 0 0 1 -26 -34z" fill="#fff3c9"/>
    <g transform="translate(120 ${hill})" fill="#2b2748">${landmark}</g>
    <path d="M0 ${hill + 6}q120-36 240 6t240-4v120H0z" fill="#2f4a4a"/>${hero}
    <text x="240" y="40" text-anchor="middle" font-family="Georgia, serif" font-size="${title.length > 24 ? 20 : 27}" fill="#fff">${title}</text>
    <text x="240" y="288" text-anchor="middle" font-family="Georgia, serif" font-size="15" fill="#fff">${setting}</text>
  </svg>`;
}

// A path of `points` points, and as many notches, around 0 0.
function star(points, far, near) {
  const corner = (i) => {
    const angle = (Math.PI * i) / points, radius = i % 2 ? near : far;
    return `${(radius * Math.sin(angle)).toFixed(1)} ${(-radius * Math.cos(angle)).toFixed(1)}`;
  };
  return `M${Array.from({length: 2 * points}, (_, i) => corner(i)).join("L")}z`;
}
