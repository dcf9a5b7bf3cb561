// The page shows one batch at a time: all completions of `inspect`, or those of one training step. It ranks the tokens
// of a batch once. A token is selected if its rank is below k.
const CHUNK = 20; // the completions of a chunk; its elements exist only while it is near the window
const BLOCK_TOKENS = 400; // the tokens of a block of a completion; its elements too exist only near the window
const BLOCK_LIMIT = 800; // the length at which a block ends even without a line break
const FILL_AT_ONCE = 2000; // the tokens of a chunk that are drawn without waiting for the observer
const GLYPH_TOKENS = 32; // the most tokens that are tried as parts of one character
const TABLE_ROWS = 20;
const BINS = 64;

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// ---- A batch

async function column(text, Type) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Type(await new Response(stream).arrayBuffer());
}

// The rank of each token by entropy, highest first, with NaN before all others and ties by position. This is the order
// of entropy_rl::global_top_mask. A stable radix sort of the bits: -0 equals 0, and a larger entropy has a smaller key.
function ranks(entropy, owner, completions) {
  const n = entropy.length;
  const value = new Float32Array(n), key = new Uint32Array(value.buffer);
  for (let i = 0; i < n; i++) value[i] = entropy[i] + 0;
  for (let i = 0; i < n; i++) key[i] = Number.isNaN(entropy[i]) ? 0 : key[i] >>> 31 ? key[i] : ~(key[i] | 0x80000000);
  let order = new Uint32Array(n), next = new Uint32Array(n);
  for (let i = 0; i < n; i++) order[i] = i;
  for (const shift of [0, 11, 22]) {
    const place = new Uint32Array(2049);
    for (let i = 0; i < n; i++) place[((key[i] >>> shift) & 2047) + 1] += 1;
    for (let b = 1; b < 2049; b++) place[b] += place[b - 1];
    for (let p = 0; p < n; p++) next[place[(key[order[p]] >>> shift) & 2047]++] = order[p];
    [order, next] = [next, order];
  }
  const rank = new Uint32Array(n), rankInCompletion = new Uint32Array(n), seen = new Uint32Array(completions);
  for (let p = 0; p < n; p++) {
    rank[order[p]] = p;
    rankInCompletion[order[p]] = seen[owner[order[p]]]++;
  }
  return { order, rank, rankInCompletion };
}

async function readModel(model, name, { lengths, starts, owner, n }) {
  const entropy = model.entropy ? await column(model.entropy, Float32Array) : new Float32Array(n);
  const sums = new Float64Array(lengths.length), ranked = ranks(entropy, owner, lengths.length);
  const top = Math.max(...[...ranked.order.slice(0, 1000)].map((i) => entropy[i]).filter(Number.isFinite), 1e-6);
  const bin = new Uint8Array(n); // the bar of each token in the histogram, from 0 to `top` nats
  for (let i = 0; i < n; i++) {
    sums[owner[i]] += entropy[i];
    bin[i] = Number.isFinite(entropy[i]) ? Math.max(0, Math.min(BINS - 1, Math.floor((entropy[i] / top) * BINS))) : BINS;
  }
  return {
    name,
    entropy,
    ...ranked,
    top,
    bin,
    sum: sums.reduce((a, b) => a + b, 0),
    meanOf: sums.map((sum, c) => sum / Math.max(1, lengths[c])),
    alternatives: model.alternatives,
    logProb: null,
    chosen: new Uint8Array(n), // 1 for a selected token
    share: new Float64Array(lengths.length), // the selected share of each completion
  };
}

// What only the box of a token shows; it is most of the data, and is read after the page has been drawn.
async function readProbabilities(of) {
  await Promise.all(of.models.map(async (model, m) => {
    const { logProb, topTokens, topLogProb } = of.step.models[m];
    if (topTokens) model.topTokens = await column(topTokens, Int32Array);
    if (topLogProb) model.topLogProb = await column(topLogProb, Uint16Array);
    if (logProb) model.logProb = await column(logProb, Uint16Array);
  }));
}

// The bytes of each token that is part of a character, which the vocabulary writes as ⟨e6 98⟩.
const bytesOf = data.vocabulary.map((text) => {
  const found = /^⟨([0-9a-f]{2}(?: [0-9a-f]{2})*)⟩$/.exec(text);
  return found && found[1].split(" ").map((byte) => parseInt(byte, 16));
});
// Whether two texts are one character: a letter with its marks, an emoji with its color, emoji with a joiner between
// them, the two letters of a flag.
const joined = (text, next) => /^[\p{M}\p{Emoji_Modifier}\u200d]/u.test(next)
  || (text.endsWith("\u200d") && /^\p{Extended_Pictographic}/u.test(next))
  || (/^\p{RI}$/u.test(text) && /^\p{RI}$/u.test(next));
const isPart = data.vocabulary.map((text, t) => bytesOf[t] !== null || joined("", text) || /^\p{RI}$/u.test(text));

// The runs of tokens that are parts of the same character: first token -> { end, text }.
function findGlyphs({ tokens, lengths, starts }) {
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  const glyphs = new Map();
  if (!isPart.some(Boolean)) return glyphs;
  const read = (i, last) => { // what begins at token i: a token's text, or a character of several tokens
    const bytes = [];
    for (let end = i; end < Math.min(i + GLYPH_TOKENS, last) && bytesOf[tokens[end]]; end++) {
      bytes.push(...bytesOf[tokens[end]]);
      try {
        return { end: end + 1, text: decoder.decode(Uint8Array.from(bytes)) };
      } catch { /* the character needs more tokens, or the model never completed it */ }
    }
    return { end: i + 1, text: data.vocabulary[tokens[i]] };
  };
  lengths.forEach((_, c) => {
    const last = starts[c + 1];
    for (let i = starts[c]; i < last; i++) {
      if (!isPart[tokens[i]] && !isPart[tokens[i + 1]]) continue;
      let { end, text } = read(i, last);
      const whole = end === i + 1 && [...text.trimStart()].length > 1; // a word, not one character
      while (!whole && end < Math.min(i + GLYPH_TOKENS, last)) {
        const next = read(end, last);
        if (!joined(text, next.text)) break;
        [end, text] = [next.end, text + next.text];
      }
      if (end > i + 1) glyphs.set(i, { end, text });
      i = end - 1;
    }
  });
  return glyphs;
}

async function readBatch(step) {
  const { lengths } = step;
  const starts = new Uint32Array(lengths.length + 1); // the first token of each completion
  lengths.forEach((length, c) => { starts[c + 1] = starts[c] + length; });
  const n = starts[lengths.length];
  const owner = new Uint32Array(n); // the completion of each token
  lengths.forEach((_, c) => owner.fill(c, starts[c], starts[c + 1]));
  const { promptOf, scores, advantages } = step;
  const read = { step, promptOf, scores, advantages, lengths, starts, n, owner, tokens: await column(step.tokens, Int32Array) };
  read.trained = step.selected && await column(step.selected, Uint8Array);
  read.models = await Promise.all(step.models.map((model, m) => readModel(model, data.names[m], read)));
  read.measured = step.models[0].entropy !== null;
  read.glyphs = findGlyphs(read);
  return read;
}

const state = {
  ratio: data.ratio, scope: "batch", step: 0, view: 0, cursor: -1, highest: true, least: 1,
  sort: "input", problem: null, share: [0, 1], reward: [-Infinity, Infinity],
};
const scale = Math.max(data.scale, 1e-6); // the entropy with the strongest shade
let batch = await readBatch(data.steps[0]);
const shown = () => batch.models[state.view] ?? batch.models[0]; // the model that charts and tables describe
const probability = (steps) => Math.exp(-steps * data.logProbStep);

// The expression of the paper's authors, which the op uses too.
const selectedCount = (n, ratio = state.ratio) => (n ? Math.min(n, Math.max(1, Math.trunc(n * ratio + 0.9999))) : 0);
// The boundaries of the parts of the batch within which tokens compete.
const segments = () => (state.scope === "sequence" ? batch.starts : [0, batch.n]);

function select() {
  const bounds = segments();
  for (const model of batch.models) {
    const { chosen, share } = model;
    if (state.scope === "trained") chosen.set(batch.trained);
    else if (!batch.measured) chosen.fill(0);
    else {
      const rank = state.scope === "sequence" ? model.rankInCompletion : model.rank;
      for (let s = 0; s + 1 < bounds.length; s++) {
        const k = selectedCount(bounds[s + 1] - bounds[s]);
        for (let i = bounds[s]; i < bounds[s + 1]; i++) chosen[i] = rank[i] < k ? 1 : 0;
      }
    }
    share.fill(0);
    for (let i = 0; i < batch.n; i++) share[batch.owner[i]] += chosen[i];
    model.count = share.reduce((a, b) => a + b, 0);
    batch.lengths.forEach((length, c) => { share[c] /= Math.max(1, length); });
  }
}

// ---- Words and elements

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const cssPercent = (share) => `${100 * share}%`;
const { format: count } = new Intl.NumberFormat("en");
const nats = (value) => (Number.isNaN(value) ? "NaN" : value.toFixed(3));
const short = (value) => (value === null ? "none" : String(+value.toFixed(3)));
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : NaN);

function element(tag, properties = {}, ...children) {
  const { style, ...others } = properties;
  const node = Object.assign(document.createElement(tag), others);
  for (const [name, value] of Object.entries(style ?? {})) node.style.setProperty(name, value);
  node.append(...children);
  return node;
}

// The text of a token with visible white space and format characters.
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length))
  .replace(/[\p{Cf}\ufe00-\ufe0f]/gu, (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`) || "∅";

function choice(fieldset, name, options, chosen, act) {
  options.forEach(([value, label]) => {
    const input = element("input", { type: "radio", name, value, checked: value === chosen, onchange: () => act(value) });
    fieldset.append(element("label", {}, input, label));
  });
}

function text(first, end) {
  let joined = "";
  for (let i = first; i < end; i++) {
    const glyph = batch.glyphs.get(i);
    joined += glyph ? glyph.text : data.vocabulary[batch.tokens[i]];
    if (glyph) i = glyph.end - 1;
  }
  return joined;
}

async function copy(button, c) {
  const copied = text(batch.starts[c], batch.starts[c + 1]);
  try {
    await navigator.clipboard.writeText(copied);
  } catch { // no permission: the older way
    const area = document.body.appendChild(element("textarea", { value: copied }));
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus({ preventScroll: true });
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// ---- Completions: chunks of completions, and in them blocks of tokens, which have elements while they are near the
// window

function tokenSpan(i) {
  const span = element("span", { className: "t" });
  span.dataset.i = i;
  return span;
}

function wordSpan(i) {
  const span = tokenSpan(i), word = data.vocabulary[batch.tokens[i]];
  if (/[\n\t]/.test(word)) {
    for (const part of word.split(/(\n|\t)/)) {
      if (part === "\n" || part === "\t") span.append(element("span", { className: "unseen" }, visible(part)));
      span.append(part);
    }
  } else {
    span.append(word || element("span", { className: "unseen" }, "∅"));
  }
  return span;
}

function paint(span) {
  const i = +span.dataset.i, { models } = batch;
  const change = state.view === models.length ? models[1].entropy[i] - models[0].entropy[i] : null;
  const value = change ?? shown().entropy[i];
  span.style.setProperty("--h", Math.min(1, Math.abs(Number.isNaN(value) ? scale : value) / scale).toFixed(3));
  span.classList.toggle("down", change !== null && change < 0);
  span.classList.toggle("a", models[0].chosen[i] === 1);
  span.classList.toggle("b", models.length > 1 && models[1].chosen[i] === 1);
  span.classList.toggle("cursor", i === state.cursor);
}

function fillBlock(block) {
  if (block.spans) return;
  block.spans = [];
  for (let i = block.first; i < block.end; i++) {
    const glyph = batch.glyphs.get(i);
    if (!glyph) {
      block.node.append(block.spans[block.spans.push(wordSpan(i)) - 1]);
      continue;
    }
    // The character is drawn across the cells of its tokens.
    const around = element("span", { className: "glyph", style: { "--parts": glyph.end - i } },
      /^[\p{Cf}\ufe00-\ufe0f]+$/u.test(glyph.text) ? element("span", { className: "unseen" }, visible(glyph.text)) : element("span", {}, glyph.text));
    for (let part = i; part < glyph.end; part++) {
      const cell = block.spans[block.spans.push(tokenSpan(part)) - 1];
      cell.style.gridColumn = part - i + 1;
      around.append(cell);
    }
    i = glyph.end - 1;
    block.node.append(around);
  }
  block.node.style.minHeight = "";
  block.spans.forEach(paint);
}

function emptyBlock(block) {
  if (!block.spans) return;
  block.node.style.minHeight = `${block.node.offsetHeight}px`;
  block.node.replaceChildren();
  block.spans = null;
}

// Changes what is outside the window and leaves what is inside in its place. The browser's own scroll anchoring does
// not do so, because the minimum heights change.
function inPlace(act) {
  const inWindow = ({ node }) => {
    const { top, bottom } = node.getBoundingClientRect();
    return bottom > innerHeight / 3 && top < innerHeight; // the header may cover the rest
  };
  const anchor = [...views.values()].flatMap(({ blocks }) => blocks).find(inWindow) ?? chunks.find(inWindow);
  const before = anchor?.node.getBoundingClientRect().top;
  act();
  if (anchor?.node.isConnected) scrollBy(0, anchor.node.getBoundingClientRect().top - before);
}

const observer = (fill, empty) => new IntersectionObserver(
  (entries) => inPlace(() => entries.forEach(({ target, isIntersecting }) => (isIntersecting ? fill : empty)(target.contents))),
  { rootMargin: "1500px 0px" },
);
const blocksNearby = observer(fillBlock, emptyBlock);
const chunksNearby = observer(fillChunk, emptyChunk);
const views = new Map(); // completion -> its elements, while they exist
let chunks = [], chunkOf = new Map();

function addBlocks(view, first, last) {
  let begin = first, lines = 1, width = 0; // the estimated height, for the scroll bar, until the block has been shown
  for (let i = first; i < last; i++) {
    const word = data.vocabulary[batch.tokens[i]], size = i + 1 - begin, glyph = batch.glyphs.get(i);
    width += word.length;
    if (word.includes("\n") || width > 90) { lines += 1; width = 0; }
    if (glyph) i = glyph.end - 1;
    if (i + 1 < last && size < BLOCK_LIMIT && !(size >= BLOCK_TOKENS && word.includes("\n"))) continue;
    const node = element("div", { className: "block", style: { "min-height": `${lines * 30}px` } });
    view.blocks.push(node.contents = { first: begin, end: i + 1, node, spans: null });
    view.article.append(node);
    blocksNearby.observe(node);
    [begin, lines, width] = [i + 1, 1, 0];
  }
}

function addCompletion(c) {
  const prompt = data.prompts[batch.promptOf[c]], question = data.questions[batch.promptOf[c]];
  const share = element("span"), entropy = element("span");
  const facts = [element("span", {}, `${count(batch.lengths[c])} tokens`), share, entropy];
  if (batch.scores) facts.unshift(element("span", {}, "reward ", element("b", {}, short(batch.scores[c]))));
  if (batch.advantages?.[c] != null) facts.splice(1, 0, element("span", {}, `advantage ${short(batch.advantages[c])}`));
  const buttons = [element("button", { type: "button", onclick: (event) => copy(event.target, c), ariaLabel: `Copy completion ${c + 1}` }, "Copy")];
  if (data.steps.length > 1 || batch.scores) {
    buttons.push(element("button", { type: "button", onclick: () => pin(batch.promptOf[c]) }, "This problem"));
  }
  const article = element("article", { id: `c${c}` },
    element("div", { className: "head" },
      element("h3", {}, element("a", { href: fragment(c), title: "Link to this completion" }, `#${c + 1}`)), ...facts, ...buttons),
    element("details", {},
      element("summary", {}, element("span", { className: "label" }, "Prompt: "), question.replace(/\s+/g, " ").slice(0, 300) || "prompt"),
      element("div", {}, prompt)));
  const view = { article, share, entropy, blocks: [] };
  addBlocks(view, batch.starts[c], batch.starts[c + 1]);
  views.set(c, view);
  drawHead(c, view);
  return article;
}

function fillChunk(chunk) {
  if (chunk.filled) return;
  chunk.filled = true;
  chunk.node.append(...chunk.list.map(addCompletion));
  chunk.node.style.minHeight = "";
  const size = chunk.list.reduce((sum, c) => sum + batch.lengths[c], 0);
  if (size <= FILL_AT_ONCE) chunk.list.forEach((c) => views.get(c).blocks.forEach(fillBlock));
}

function emptyChunk(chunk) {
  if (!chunk.filled) return;
  chunk.filled = false;
  chunk.node.style.minHeight = `${chunk.node.offsetHeight}px`;
  for (const c of chunk.list) {
    views.get(c).blocks.forEach(({ node }) => blocksNearby.unobserve(node));
    views.delete(c);
  }
  chunk.node.replaceChildren();
}

const within = (value, [low, high]) => value >= low && value <= high;
const filtered = () => state.problem !== null || state.share[0] > 0 || state.share[1] < 1 || state.reward.some(Number.isFinite);

function listed() {
  const { share, meanOf } = shown();
  const list = [...batch.lengths.keys()].filter((c) => within(share[c], state.share)
    && (!batch.scores || within(batch.scores[c], state.reward)) && (state.problem === null || batch.promptOf[c] === state.problem));
  const by = { share: (c) => share[c], entropy: (c) => meanOf[c], length: (c) => batch.lengths[c], reward: (c) => batch.scores[c] }[state.sort];
  return by ? list.sort((a, b) => by(b) - by(a) || a - b) : list;
}

function drawCompletions() {
  chunksNearby.disconnect();
  blocksNearby.disconnect();
  views.clear();
  const list = listed();
  chunks = [];
  chunkOf = new Map();
  for (let begin = 0; begin < list.length; begin += CHUNK) {
    const chunk = { list: list.slice(begin, begin + CHUNK), filled: false };
    const height = chunk.list.reduce((sum, c) => sum + 120 + 30 * Math.ceil(batch.lengths[c] / 20), 0);
    chunk.node = element("div", { className: "chunk", contents: chunk, style: { "min-height": `${height}px` } });
    chunk.list.forEach((c) => chunkOf.set(c, chunk));
    chunks.push(chunk);
  }
  byId("completions").replaceChildren(...chunks.map((chunk) => chunk.node));
  if (chunks.length) fillChunk(chunks[0]);
  chunks.forEach((chunk) => chunksNearby.observe(chunk.node));
  const all = batch.lengths.length;
  byId("listed").textContent = list.length === all ? `${count(all)} completions` : `${count(list.length)} of ${count(all)} completions`;
  byId("clear").hidden = !filtered();
}

// ---- Charts: each is drawn again when the share changes

function svg(parent, label, ...shapes) {
  if (parent.getAttribute("role") !== "slider") parent.setAttribute("role", "img");
  parent.setAttribute("aria-label", label);
  parent.innerHTML = `<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${shapes.join("")}</svg>`;
}

const bars = (heights) => [...heights].map((h, i) => {
  const width = 100 / heights.length;
  return `M${(i * width).toFixed(2)} 100v${(-98 * h).toFixed(2)}h${(width * 0.86).toFixed(2)}V100z`;
}).join("");

const chartOf = (name) => document.querySelector(`[data-chart=${name}]`);
const curve = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${(100 - 98 * y).toFixed(2)}`).join("")
  + (points.length === 1 ? "h0" : ""); // a dot
const across = (x) => `<line class="at" x1="${x}" x2="${x}" y1="0" y2="100"/>`;
const shareGuide = () => {
  const y = 100 - 98 * (batch.n ? shown().count / batch.n : 0);
  return `<line class="guide" x1="0" x2="100" y1="${y}" y2="${y}"/>`;
};

// The lowest selected entropy; by sequence, the lowest and the highest of the sequences' thresholds.
function thresholds({ entropy, order, chosen }) {
  if (state.scope === "batch") return [entropy[order[selectedCount(batch.n) - 1]]];
  const lowest = new Float64Array(batch.lengths.length).fill(Infinity);
  for (let i = 0; i < batch.n; i++) if (chosen[i]) lowest[batch.owner[i]] = Math.min(lowest[batch.owner[i]], entropy[i]);
  const found = lowest.filter((value) => value < Infinity).sort();
  return state.scope === "sequence" ? [found[0], found.at(-1)] : [found[0]];
}

function drawHistogram() {
  const { top, bin, chosen, sum } = shown();
  const all = new Float64Array(BINS + 1), on = new Float64Array(BINS + 1); // the last ones for what is not finite
  for (let i = 0; i < batch.n; i++) {
    all[bin[i]] += 1;
    on[bin[i]] += chosen[i];
  }
  const highest = Math.log1p(all.subarray(0, BINS).reduce((a, b) => Math.max(a, b), 1));
  const heights = (counts) => bars(counts.subarray(0, BINS).map((c) => Math.log1p(c) / highest));
  const [threshold] = thresholds(shown());
  const x = Number.isFinite(threshold) ? (100 * Math.max(threshold, 0)) / top : 100;
  svg(chartOf("histogram"), `Histogram of the entropies from 0 to ${top.toFixed(2)} nats, mean ${nats(sum / batch.n)}; the selected tokens in color`,
    `<path class="bars" d="${heights(all)}"/><path class="bars on" d="${heights(on)}"/>`, state.scope === "batch" ? across(x) : "");
  byId("histogram-mean").textContent = `nats, mean ${nats(sum / batch.n)}; height is log count`;
  byId("histogram-end").textContent = top.toFixed(2);
}

function drawPositions() {
  const { chosen } = shown();
  const longest = batch.lengths.reduce((a, b) => Math.max(a, b), 1);
  const width = Math.ceil(longest / BINS);
  const all = new Float64Array(Math.ceil(longest / width)), on = new Float64Array(all.length);
  for (let c = 0; c < batch.lengths.length; c++) {
    for (let i = batch.starts[c]; i < batch.starts[c + 1]; i++) {
      const bin = Math.floor((i - batch.starts[c]) / width);
      all[bin] += 1;
      on[bin] += chosen[i];
    }
  }
  svg(chartOf("positions"), `Selected share by position, from token 1 to ${count(longest)}`,
    `<path class="bars on" d="${bars(all.map((a, b) => (a ? on[b] / a : 0)))}"/>`, shareGuide());
  byId("positions-end").textContent = count(longest);
}

const sequences = chartOf("sequences");
let byShare = []; // completions, the one with the highest share of selected tokens first
let place = 0; // the place in byShare that the chart's cursor is at
function drawSequences() {
  const { share } = shown();
  byShare = [...share.keys()].sort((a, b) => share[b] - share[a]);
  const heights = byShare.map((c) => share[c]);
  const last = Math.max(1, heights.length - 1);
  svg(sequences, "Completions by selected share; Enter goes to the completion",
    heights.length <= 2 * BINS
      ? `<path class="bars on" d="${bars(heights)}"/>`
      : `<path class="bars on" d="M0 100${curve(heights.map((h, i) => [(100 * i) / last, h])).replace("M", "L")}L100 100z"/>`, shareGuide());
  sequences.setAttribute("aria-valuemin", 1);
  sequences.setAttribute("aria-valuemax", byShare.length);
  drawPlace(Math.min(place, byShare.length - 1), false);
}

function drawPlace(next, named = true) {
  place = Math.max(0, Math.min(byShare.length - 1, next));
  const words = `#${byShare[place] + 1}, ${percent(shown().share[byShare[place]])}`;
  sequences.setAttribute("aria-valuenow", place + 1);
  sequences.setAttribute("aria-valuetext", words);
  byId("sequence-now").textContent = named ? words : "";
}

// For two models: how many selected positions they share at each ratio, and how many by chance. together[i] is the
// number of a segment's tokens, up to this place, that both models rank above it.
const overlaps = new Map(); // batch -> scope -> together
function overlapAt(ratio) {
  const [a, b] = batch.models, bounds = segments();
  if (!overlaps.has(batch)) overlaps.set(batch, {});
  const known = overlaps.get(batch);
  if (!known[state.scope]) {
    const together = known[state.scope] = new Uint32Array(batch.n);
    const rank = state.scope === "sequence" ? "rankInCompletion" : "rank";
    for (let s = 0; s + 1 < bounds.length; s++) {
      for (let i = bounds[s]; i < bounds[s + 1]; i++) together[bounds[s] + Math.max(a[rank][i], b[rank][i])] += 1;
      for (let i = bounds[s] + 1; i < bounds[s + 1]; i++) together[i] += together[i - 1];
    }
  }
  let both = 0, chosen = 0, chance = 0;
  for (let s = 0; s + 1 < bounds.length; s++) {
    const size = bounds[s + 1] - bounds[s], k = selectedCount(size, ratio);
    if (!k) continue;
    both += known[state.scope][bounds[s] + k - 1];
    chosen += k;
    chance += (k * k) / size;
  }
  return { share: both / chosen, chance: chance / chosen };
}

function drawOverlap() {
  const points = Array.from({ length: 100 }, (_, i) => (i + 1) / 100).map((r) => [100 * r, overlapAt(r).share]);
  const { share, chance } = overlapAt(state.ratio);
  svg(chartOf("overlap"), `Overlap ${percent(share)} of the selected positions, by chance ${percent(chance)}`,
    `<line class="guide" x1="0" x2="100" y1="100" y2="2"/><path class="curve" d="${curve(points)}"/>`, across(100 * state.ratio));
  byId("overlap-now").textContent = percent(share);
  byId("overlap-chance").textContent = `by chance ${percent(chance)}`;
}

// ---- Tables

const statistics = new WeakMap(); // model -> mean entropy and number of every token that occurs

function tokenStatistics(model) {
  if (!statistics.has(model)) {
    const times = new Float64Array(data.vocabulary.length), sum = new Float64Array(data.vocabulary.length);
    for (let i = 0; i < batch.n; i++) { times[batch.tokens[i]] += 1; sum[batch.tokens[i]] += model.entropy[i]; }
    const ordered = [...times.keys()].filter((t) => times[t]).sort((a, b) => sum[b] / times[b] - sum[a] / times[a]);
    statistics.set(model, { times, sum, ordered });
  }
  return statistics.get(model);
}

// A mean over few tokens is noise: the bound grows with the input, but leaves enough tokens for the table.
function defaultLeast() {
  const { times, ordered } = tokenStatistics(batch.models[0]);
  const frequent = ordered.map((t) => times[t]).sort((a, b) => b - a);
  return Math.max(1, Math.min(Math.max(5, Math.round(Math.sqrt(batch.n) / 4)), frequent[TABLE_ROWS - 1] ?? 1));
}

function drawTable() {
  const model = shown();
  const { times, sum, ordered } = tokenStatistics(model);
  const frequent = ordered.filter((t) => times[t] >= state.least);
  const rows = state.highest ? frequent.slice(0, TABLE_ROWS) : frequent.slice(-TABLE_ROWS).reverse();
  const chosen = new Float64Array(data.vocabulary.length);
  for (let i = 0; i < batch.n; i++) chosen[batch.tokens[i]] += model.chosen[i];
  const top = frequent.length ? sum[frequent[0]] / times[frequent[0]] : 1;
  byId("tokens").replaceChildren(...rows.map((t) => {
    const next = () => goTo((batch.tokens.indexOf(t, state.cursor + 1) + 1 || batch.tokens.indexOf(t) + 1) - 1);
    return element("tr", {},
      element("td", {}, element("button", { type: "button", title: "Go to the next one", onclick: next }, visible(data.vocabulary[t]))),
      element("td", {}, count(times[t])),
      element("td", { className: "bar", style: { "--size": cssPercent(sum[t] / times[t] / top) } }, nats(sum[t] / times[t])),
      element("td", {}, percent(chosen[t] / times[t], 0)));
  }));
}

// ---- Steps, and one problem over the steps

const rewards = data.steps.some((step) => step.scores);
const stepName = (step) => (step.step === null ? "" : `step ${step.step}`);

function overTime() { // for each step: what the listed problem, or every problem, has there
  return data.steps.map((step, s) => {
    const list = [...step.promptOf.keys()].filter((c) => state.problem === null || step.promptOf[c] === state.problem);
    return { s, step, list, reward: step.scores ? mean(list.map((c) => step.scores[c])) : NaN, entropy: mean(list.map((c) => step.meanEntropy[c])) };
  }).filter(({ list }) => list.length);
}

function drawSteps() {
  if (byId("time").hidden) return;
  const times = overTime(), value = rewards ? "reward" : "entropy";
  const values = times.map((time) => time[value]).filter(Number.isFinite);
  const low = Math.min(...values), high = Math.max(...values), last = Math.max(1, data.steps.length - 1);
  const points = times.filter((time) => Number.isFinite(time[value]))
    .map((time) => [(100 * time.s) / last, high > low ? (time[value] - low) / (high - low) : 0.5]);
  const what = `Mean ${value} ${state.problem === null ? "" : "of this problem "}over the steps`;
  byId("time-title").textContent = what;
  svg(chartOf("time"), `${what}, from ${short(low)} to ${short(high)}`,
    `<path class="curve" d="${curve(points)}"/>`, across((100 * state.step) / last));
  byId("time-range").textContent = values.length ? `${short(low)} to ${short(high)}` : "";
  byId("times-table").hidden = state.problem === null;
  byId("times").replaceChildren(...(state.problem === null ? [] : times).map(({ s, step, list, reward, entropy }) =>
    element("tr", { className: s === state.step ? "now" : "" },
      element("td", {}, element("button", { type: "button", onclick: () => showStep(s) }, stepName(step))),
      element("td", {}, count(list.length)), element("td", {}, Number.isNaN(reward) ? "" : short(reward)), element("td", {}, nats(entropy)))));
  byId("problem").hidden = state.problem === null;
  byId("problem").textContent = state.problem === null ? "" : data.questions[state.problem].replace(/\s+/g, " ").slice(0, 200);
}

function pin(problem) {
  state.problem = problem;
  drawSteps();
  drawCompletions();
  byId("clear").focus();
}

async function showStep(s) {
  state.step = s;
  byId("step").value = s;
  const read = await readBatch(data.steps[s]);
  if (state.step !== s) return; // the slider has moved on
  batch = read;
  overlaps.clear();
  state.cursor = -1;
  place = 0;
  hideTip();
  startBatch();
}

// ---- Share, view, theme

function drawFacts() {
  const model = shown();
  let carried = 0;
  for (let i = 0; i < batch.n; i++) if (model.chosen[i]) carried += model.entropy[i];
  const facts = {
    "begins at": [model.count ? thresholds(model).map((value) => nats(value ?? NaN)).join(" to ") : "none", " nats"],
    tokens: [count(model.count), ` of ${count(batch.n)}`],
    "of all entropy": [percent(model.sum ? carried / model.sum : 0, 0), ""],
  };
  if (batch.scores) facts["mean reward"] = [short(mean(batch.scores)), ""];
  byId("facts").replaceChildren(...Object.entries(facts).map(([name, [value, unit]]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, unit)))));
}

function drawHead(c, view) {
  const { share, meanOf } = shown();
  view.share.textContent = `${percent(share[c])} selected`;
  view.entropy.textContent = batch.measured ? `mean entropy ${nats(meanOf[c])}` : "";
}

function drawLegend() {
  const change = state.view === batch.models.length;
  const ramp = element("span", { className: change ? "ramp change" : "ramp" });
  const marks = batch.models.map((model, m) => element("span", {},
    element("span", { className: `t ${"ab"[m]}`, style: { "--h": 0 } }, " marked "),
    batch.models.length > 1 ? ` selected by ${model.name}` : " selected"));
  byId("legend").replaceChildren(
    element("span", {}, change ? `entropy change −${scale.toFixed(1)}` : "entropy 0", ramp, `${change ? "+" : ""}${scale.toFixed(1)} nats and more`), ...marks);
}

function drawAll() {
  select();
  byId("ratio").value = state.ratio;
  byId("ratio").ariaValueText = percent(state.ratio);
  if (document.activeElement !== byId("percent")) byId("percent").value = +(100 * state.ratio).toFixed(3);
  views.forEach((view, c) => {
    drawHead(c, view);
    view.blocks.forEach((block) => block.spans?.forEach(paint));
  });
  for (const draw of [drawFacts, drawHistogram, drawPositions, drawSequences, drawTable]) draw();
  if (batch.models.length > 1) drawOverlap();
  if (state.sort === "share" || state.share[0] > 0 || state.share[1] < 1) drawCompletions();
}

let frame = 0;
function change() {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(drawAll);
}

function setRatio(ratio) {
  if (!(ratio > 0 && ratio <= 1)) return;
  state.ratio = ratio;
  if (state.scope === "trained") setScope("batch");
  change();
}

function setScope(scope) {
  state.scope = scope;
  for (const input of document.querySelectorAll("#scopes input")) input.checked = input.value === scope;
  change();
}

function startBatch() {
  document.body.classList.toggle("unmeasured", !batch.measured);
  byId("step-now").textContent = byId("step").ariaValueText = stepName(batch.step);
  if (!batch.trained && state.scope === "trained") state.scope = "batch";
  for (const input of document.querySelectorAll("#scopes input")) {
    input.disabled = input.value === "trained" && !batch.trained;
    input.checked = input.value === state.scope;
  }
  byId("least").value = state.least = defaultLeast();
  views.clear(); // those of the batch before
  drawAll();
  drawCompletions();
  drawSteps();
  // After the first paint.
  const started = batch;
  started.complete = new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); })
    .then(() => readProbabilities(started)).then(completeTip);
}

// ---- The token under the pointer or the cursor

function describe(model, m, i) {
  const { alternatives: width } = model;
  const list = element("ol");
  for (let a = i * width; model.logProb && a < (i + 1) * width; a++) {
    const p = probability(model.topLogProb[a]);
    list.append(element("li", { className: model.topTokens[a] === batch.tokens[i] ? "taken" : "", style: { "--size": cssPercent(p) } },
      element("span", {}, visible(data.vocabulary[model.topTokens[a]])), element("span", {}, percent(p))));
  }
  const facts = batch.measured ? [["entropy", `${nats(model.entropy[i])} nats`], ["rank", count(model.rank[i] + 1)]] : [];
  if (model.logProb) facts.push(["probability", percent(probability(model.logProb[i]))]);
  return element("div", {}, ...(batch.models.length > 1 ? [element("b", { className: m ? "second" : "first" }, model.name)] : []),
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])), list);
}

function glyphAround(i) {
  for (let first = i; first > i - GLYPH_TOKENS && first >= 0; first--) {
    const glyph = batch.glyphs.get(first);
    if (glyph) return glyph.end > i ? { ...glyph, first } : null;
  }
  return null;
}

function showTip(span) {
  const i = +span.dataset.i, tip = byId("tip"), c = batch.owner[i], glyph = glyphAround(i);
  const selected = batch.models.some((model) => model.chosen[i]);
  tip.replaceChildren(
    element("div", { className: "token" }, visible(data.vocabulary[batch.tokens[i]])),
    element("div", { className: "where" }, `token ${count(i - batch.starts[c] + 1)} of completion ${c + 1}${selected ? ", selected" : ""}`),
    ...(glyph ? [element("div", { className: "where" }, `part ${i - glyph.first + 1} of ${glyph.end - glyph.first} of ${visible(glyph.text)}`)] : []),
    element("div", { className: "columns" }, ...batch.models.map((model, m) => describe(model, m, i))));
  tip.hidden = false;
  const at = span.getClientRects()[0], box = tip.getBoundingClientRect();
  const below = at.bottom + 8;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.width - 8))}px`;
  tip.style.top = `${below + box.height < innerHeight ? below : Math.max(8, at.top - box.height - 8)}px`;
}

function completeTip() { // of a token that was opened before its probabilities had been read
  const span = document.querySelector(".t.cursor");
  if (span && !byId("tip").hidden) showTip(span);
}

const hideTip = () => { byId("tip").hidden = true; };

// ---- Places in the page: #12 is a completion, #12.34 a token, #step3-12.34 a token of a training step

function fragment(c, t) {
  return `#${batch.step.step === null ? "" : `step${batch.step.step}-`}${c + 1}${t === undefined ? "" : `.${t + 1}`}`;
}

function viewOf(c) {
  if (!chunkOf.has(c)) { // the filters hide it
    clearFilters();
    drawCompletions();
  }
  fillChunk(chunkOf.get(c));
  return views.get(c);
}

function goTo(i, scroll = true) {
  if (!(i >= 0 && i < batch.n)) return;
  const before = state.cursor, c = batch.owner[i];
  state.cursor = i;
  const block = viewOf(c).blocks.find(({ end }) => i < end);
  fillBlock(block);
  const span = block.spans[i - block.first];
  document.querySelector(`.t[data-i="${before}"]`)?.classList.remove("cursor");
  paint(span);
  if (scroll) span.scrollIntoView({ block: "center" });
  showTip(span);
  try {
    history.replaceState(null, "", fragment(c, i - batch.starts[c]));
  } catch { /* Safari limits how often the address changes */ }
}

function goToCompletion(c) {
  if (c >= 0 && c < batch.lengths.length) viewOf(c).article.scrollIntoView();
}

async function goToFragment() {
  const found = /^#(?:step(\d+)-)?(\d+)(?:\.(\d+))?$/.exec(location.hash);
  if (!found) return;
  const [, step, c, t] = found.map((number) => number && Number(number));
  const s = data.steps.findIndex((candidate) => candidate.step === step);
  if (step !== undefined && s >= 0 && s !== state.step) await showStep(s);
  const completion = c - 1;
  if (t === undefined || !(t >= 1 && t <= batch.lengths[completion])) goToCompletion(completion);
  else goTo(batch.starts[completion] + t - 1);
}

const reading = byId("reading");
reading.addEventListener("pointerover", (event) => {
  const span = event.target.closest(".t[data-i]");
  if (span) showTip(span); else hideTip();
});
reading.addEventListener("pointerleave", hideTip);
reading.addEventListener("click", (event) => {
  const span = event.target.closest(".t[data-i]");
  if (span && getSelection().isCollapsed) goTo(+span.dataset.i, false);
});
reading.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const c = state.cursor < 0 ? -1 : batch.owner[state.cursor];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const list = chunks.flatMap((chunk) => chunk.list);
  const completion = { n: list[list.indexOf(c) + 1], p: list[list.indexOf(c) - 1] }[event.key];
  let i = { Home: batch.starts[Math.max(c, 0)], End: batch.starts[Math.max(c, 0) + 1] - 1 }[event.key];
  if (completion !== undefined) i = batch.starts[completion];
  if (step) {
    i = state.cursor + step;
    while (event.shiftKey && i >= 0 && i < batch.n && !shown().chosen[i]) i += step;
  }
  if (i === undefined) return;
  event.preventDefault();
  goTo(i);
});

const placeAt = (event) => {
  const box = sequences.getBoundingClientRect();
  return Math.floor(((event.clientX - box.left) / box.width) * byShare.length);
};
sequences.addEventListener("pointermove", (event) => drawPlace(placeAt(event)));
sequences.addEventListener("click", () => goToCompletion(byShare[place]));
sequences.addEventListener("keydown", (event) => {
  const next = { ArrowRight: place + 1, ArrowUp: place + 1, ArrowLeft: place - 1, ArrowDown: place - 1, Home: 0, End: byShare.length - 1 }[event.key];
  if (next === undefined && event.key !== "Enter") return;
  event.preventDefault();
  if (next === undefined) goToCompletion(byShare[place]); else drawPlace(next);
});
chartOf("time").addEventListener("click", (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  showStep(Math.round(((event.clientX - box.left) / box.width) * (data.steps.length - 1)));
});

// ---- Controls

function clearFilters() {
  Object.assign(state, { problem: null, share: [0, 1], reward: [-Infinity, Infinity] });
  for (const input of document.querySelectorAll("#filters input")) input.value = "";
  drawSteps();
}

function bounds(name, low, high, unit = 1) {
  const inputs = [byId(`${name}-low`), byId(`${name}-high`)];
  inputs.forEach((input) => input.addEventListener("input", () => {
    state[name] = inputs.map((each, side) => (each.value === "" ? [low, high][side] : each.valueAsNumber / unit));
    drawCompletions();
  }));
}
bounds("share", 0, 1, 100);
bounds("reward", -Infinity, Infinity);
byId("clear").addEventListener("click", () => { clearFilters(); drawCompletions(); });
byId("sort").addEventListener("change", (event) => { state.sort = event.target.value; drawCompletions(); });
byId("step").addEventListener("input", (event) => showStep(Number(event.target.value)));
byId("ratio").addEventListener("input", (event) => setRatio(Number(event.target.value)));
byId("percent").addEventListener("input", (event) => setRatio(Number(event.target.value) / 100));
byId("least").addEventListener("input", (event) => { state.least = Math.max(1, Number(event.target.value)); drawTable(); });
byId("theme").addEventListener("click", () => {
  const root = document.documentElement.style;
  const dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.colorScheme = dark ? "light" : "dark";
});
byId("charts").addEventListener("click", (event) => {
  const open = document.body.classList.toggle("charts");
  event.currentTarget.ariaExpanded = open;
  if (open) byId("panels").scrollIntoView();
});
addEventListener("hashchange", goToFragment);

byId("models").append(...batch.models.flatMap((model, m) => [
  ...(m ? [" and "] : []), element("span", { className: batch.models.length > 1 ? ["first", "second"][m] : "" }, model.name)]));
byId("models").title = byId("models").textContent;
const same = data.sampledAt === null || data.sampledAt === data.temperature;
byId("temperatures").textContent = same
  ? (data.temperature ?? 1) === 1 ? "" : `temperature ${data.temperature}`
  : `temperature ${data.sampledAt}, measured at ${data.temperature}`;
document.title = `Forking tokens: ${data.title}`;

choice(byId("table-order"), "order", [[true, "highest"], [false, "lowest"]], true, (value) => { state.highest = value; drawTable(); });
const scopes = [["batch", "by batch"], ["sequence", "by sequence"]];
if (data.steps.some((step) => step.selected)) {
  scopes.push(["trained", "as trained"]);
  state.scope = "trained";
}
choice(byId("scopes"), "scope", scopes, state.scope, setScope);
if (batch.models.length > 1) {
  byId("views").hidden = byId("overlap").hidden = false;
  choice(byId("views"), "view", [...batch.models.map((model, m) => [m, model.name]), [2, "change"]], 0, (value) => {
    state.view = value;
    drawLegend();
    drawAll();
  });
}
byId("step").max = data.steps.length - 1;
byId("steps").hidden = data.steps[0].step === null;
byId("time").hidden = data.steps.length < 2;
document.querySelectorAll(".rewards").forEach((node) => { node.hidden = !rewards; });
byId("filters").hidden = data.steps.every((step) => step.lengths.length < 2);
drawLegend();
startBatch();
goToFragment();
// For scripts and tests: the selection of a model, one flag for each token.
window.entropyReport = { setRatio, setScope, showStep, selected: (m = 0) => batch.models[m].chosen.slice(), complete: () => batch.complete };
