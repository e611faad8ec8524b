// The sampler of gemma_multi.sampling, in JavaScript: logits to one token.
//
// Randomness is a hash of (seed, position, token id), whole numbers up to the last step, so that one
// seed tells the same story here and in Python. What NumPy rounds to float32 is rounded here too.
// Loops over the vocabulary are counted ones: callbacks and iterators take ten times as long.

const BITS = 23;
const MOST_NOISE = 16.7; // -log(-log((2**23 - 0.5) / 2**23)), rounded up
const STEP = 0x9e3779b9;
const COLDEST = 1e-5; // below it, dividing by the temperature overflows
const NUCLEUS = 1024; // tokens that nearly always hold all of top-p
const round = Math.fround;

// The next token of `logits`, a Float32Array. `seen` are the ids read so far, `position` the index
// that the token will have. Options: temperature, top_k, top_p, min_p, repetition_penalty, seed.
export function choose(logits, seen, options, position) {
  const {temperature, top_k, top_p, min_p, seed} = options;
  if (!Number.isFinite(highest(logits))) throw new Error("the logits are not finite: the model is damaged");
  let scores = penalised(logits, seen, round(options.repetition_penalty));
  if (temperature < COLDEST) return scores.indexOf(highest(scores));
  if (temperature !== 1) scores = divided(scores, round(temperature));
  if (top_k === 0 && top_p === 1 && min_p === 0) return drawOfAll(scores, seed, position);

  const limited = 0 < top_k && top_k < scores.length;
  let ids = limited ? bestOf(scores, top_k) : nucleus(scores, top_p, min_p);
  const total = round(logSumExp(limited ? pick(scores, ids) : scores));
  let logs = pick(scores, ids).map((score) => score - total);
  const keep = (places) => { [ids, logs] = [pick(ids, places), pick(logs, places)]; };
  if (top_p < 1) {
    keep([...ids.keys()].sort((a, b) => logs[b] - logs[a] || ids[a] - ids[b])); // of equals, the lower id
    let sum = 0;
    keep([...ids.keys()].filter((place) => {
      const probability = round(Math.exp(logs[place]));
      sum = round(sum + probability);
      return place === 0 || round(sum - probability) < round(top_p);
    }));
  }
  if (min_p > 0) keep(atLeast(logs, leastOf(logs, min_p)));
  const rest = round(logSumExp(logs));
  return draw(ids, logs.map((log) => log - rest), seed, position);
}

// What gives the Gumbel noise of a token, if it were to stand at `position`.
export function gumbel(seed, position) {
  const [low, high, place] = [seed, Math.floor(seed / 2 ** 32), position].map((word) => scramble((word >>> 0) + STEP));
  return (id) => {
    const bits = scramble(scramble(scramble(id ^ low) ^ high) ^ place) >>> (32 - BITS);
    return round(-Math.log(round(-Math.log((bits + 0.5) * 2 ** -BITS))));
  };
}

// A bijection of 32-bit words that changes every output bit with every input bit.
function scramble(x) {
  x = Math.imul(x ^ (x >>> 16), 0x21f0aaad);
  x = Math.imul(x ^ (x >>> 15), 0x735a2d97);
  return (x ^ (x >>> 15)) >>> 0;
}

function draw(ids, scores, seed, position) {
  const noise = gumbel(seed, position);
  let chosen = ids[0], most = -Infinity;
  for (let place = 0; place < ids.length; place++) {
    const sum = round(scores[place] + noise(ids[place]));
    if (sum > most) [chosen, most] = [ids[place], sum];
  }
  return chosen;
}

// Below the best token's sum by more than noise can be, a token has lost, and needs none.
function drawOfAll(scores, seed, position) {
  const first = scores.indexOf(highest(scores));
  const possible = atLeast(scores, scores[first] + gumbel(seed, position)(first) - MOST_NOISE);
  return draw(possible, pick(scores, possible), seed, position);
}

function penalised(logits, seen, penalty) {
  if (penalty === 1) return logits;
  const scores = logits.slice();
  for (const id of new Set(seen)) scores[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return scores;
}

function divided(values, by) {
  const results = new Float32Array(values.length);
  for (let i = 0; i < values.length; i++) results[i] = values[i] / by;
  return results;
}

// The least score, or log-probability, that min-p keeps.
function leastOf(scores, min_p) {
  return round(highest(scores) + round(Math.log(round(min_p))));
}

// Ids among which all that top-p or min-p keep must be.
function nucleus(scores, top_p, min_p) {
  if (top_p === 1) return atLeast(scores, leastOf(scores, min_p));
  if (scores.length > NUCLEUS) {
    const best = bestOf(scores, NUCLEUS), total = logSumExp(scores);
    if (best.reduce((sum, id) => sum + Math.exp(scores[id] - total), 0) >= top_p) return best;
  }
  return atLeast(scores, -Infinity);
}

// The ids of the `count` best scores, and of any that tie with the last of them. The count-th best of
// the maxima of as many blocks is no more than the count-th best score.
function bestOf(scores, count) {
  const size = Math.max(1, Math.floor(scores.length / (4 * count)));
  const maxima = new Float32Array(Math.ceil(scores.length / size));
  for (let block = 0; block < maxima.length; block++)
    maxima[block] = highest(scores, block * size, (block + 1) * size);
  const near = atLeast(scores, nth(maxima, count)), values = pick(scores, near);
  return pick(near, atLeast(values, nth(values, count)));
}

// The places of what is no less than a bound.
function atLeast(values, bound) {
  const places = [];
  for (let i = 0; i < values.length; i++) if (values[i] >= bound) places.push(i);
  return places;
}

function pick(values, places) {
  const picked = new Float32Array(places.length); // ids below 2**24 are exact in it
  for (let i = 0; i < places.length; i++) picked[i] = values[places[i]];
  return picked;
}

function nth(values, count) {
  return values.slice().sort().at(-count);
}

function highest(values, from = 0, to = values.length) {
  let most = -Infinity;
  for (let i = from; i < Math.min(to, values.length); i++)
    if (values[i] > most || Number.isNaN(values[i])) most = values[i]; // nothing is more than NaN
  return most;
}

function logSumExp(values) {
  const top = highest(values);
  let sum = 0;
  for (let i = 0; i < values.length; i++) sum += round(Math.exp(round(values[i] - top)));
  return top + Math.log(sum);
}
