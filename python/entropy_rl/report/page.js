// The page reads its columns and ranks the tokens once. A token is selected if its rank is below k.
const BLOCK_TOKENS = 400; // the tokens of a block; its elements exist only while it is near the window
const BLOCK_LIMIT = 800; // the length at which a block ends even without a line break
const TABLE_ROWS = 20;
const BINS = 64;

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

async function column(text, Type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Type(await new Response(stream).arrayBuffer());
}

// The rank of each token by entropy, highest first, with NaN before all others and ties by position. This is the order
// of entropy_rl::global_top_mask.
function ranks(entropy) {
  const order = Uint32Array.from(entropy.keys());
  const value = Float64Array.from(entropy, (e) => (Number.isNaN(e) ? Infinity : e));
  order.sort((i, j) => value[j] - value[i] || i - j);
  const rank = new Uint32Array(order.length);
  order.forEach((token, place) => { rank[token] = place; });
  return { order, rank };
}

async function readModel(model) {
  const entropy = await column(model.entropy, Float32Array);
  return {
    name: model.name,
    entropy,
    ...ranks(entropy),
    sum: entropy.reduce((sum, e) => sum + e, 0),
    meanOf: data.lengths.map((length, c) => entropy.subarray(starts[c], starts[c + 1]).reduce((sum, e) => sum + e, 0) / length),
    logProb: await column(model.logProb, Uint16Array),
    alternatives: model.alternatives,
    topTokens: await column(model.topTokens, Int32Array),
    topLogProb: await column(model.topLogProb, Uint16Array),
  };
}

const starts = new Uint32Array(data.lengths.length + 1); // the first token of each completion
data.lengths.forEach((length, c) => { starts[c + 1] = starts[c] + length; });
const tokens = await column(data.tokens, Int32Array);
const models = await Promise.all(data.models.map(readModel));
const n = tokens.length;
const owner = new Uint32Array(n); // the completion of each token
data.lengths.forEach((_, c) => owner.fill(c, starts[c], starts[c + 1]));

const state = { ratio: data.ratio, k: 0, view: 0, cursor: -1, highest: true, least: Math.max(2, Math.round(n / 5000)) };
const isSelected = (model, i) => model.rank[i] < state.k;
const shown = () => models[state.view] ?? models[0]; // the model that charts and tables describe
const probability = (steps) => Math.exp(-steps * data.logProbStep);

// ---- Words and elements

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const cssPercent = (share) => `${100 * share}%`;
const count = (number) => number.toLocaleString("en");
const nats = (value) => (Number.isNaN(value) ? "NaN" : value.toFixed(3));

function element(tag, properties = {}, ...children) {
  const { style, ...others } = properties;
  const node = Object.assign(document.createElement(tag), others);
  for (const [name, value] of Object.entries(style ?? {})) node.style.setProperty(name, value);
  node.append(...children);
  return node;
}

// The text of a token with visible white space.
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, (s) => "␣".repeat(s.length)) || "∅";

function choice(fieldset, name, options, chosen, act) {
  options.forEach((label, value) => {
    const input = element("input", { type: "radio", name, checked: value === chosen, onchange: () => act(value) });
    fieldset.append(element("label", {}, input, label));
  });
}

// ---- Completions: blocks of tokens, which have elements while they are near the window

const scale = (() => { // the entropy with the strongest shade: the first model's 99th percentile
  const { order, entropy } = models[0];
  return Math.max(entropy[order[Math.floor(n * 0.01)]] || 0, 1e-6);
})();

function tokenSpan(i) {
  const span = element("span", { className: "t" });
  span.dataset.i = i;
  const text = data.vocabulary[tokens[i]];
  if (/[\n\t]/.test(text)) {
    for (const part of text.split(/(\n|\t)/)) {
      if (part === "\n" || part === "\t") span.append(element("span", { className: "unseen" }, visible(part)));
      span.append(part);
    }
  } else {
    span.append(text || element("span", { className: "unseen" }, "∅"));
  }
  return span;
}

function paint(span) {
  const i = +span.dataset.i;
  const change = state.view === models.length ? models[1].entropy[i] - models[0].entropy[i] : null;
  const value = change ?? shown().entropy[i];
  span.style.setProperty("--h", Math.min(1, Math.abs(Number.isNaN(value) ? scale : value) / scale).toFixed(3));
  span.classList.toggle("down", change !== null && change < 0);
  span.classList.toggle("a", isSelected(models[0], i));
  span.classList.toggle("b", models.length > 1 && isSelected(models[1], i));
  span.classList.toggle("cursor", i === state.cursor);
}

const heads = []; // for each completion, the elements that change with the share
const blocks = []; // { first, end, node, filled }
const blockOf = new Uint32Array(n);

function fill(block) {
  if (block.filled) return;
  for (let i = block.first; i < block.end; i++) block.node.append(tokenSpan(i));
  block.filled = true;
  block.node.style.minHeight = "";
  block.node.childNodes.forEach(paint);
}

function empty(block) {
  if (!block.filled) return;
  block.node.style.minHeight = `${block.node.offsetHeight}px`;
  block.node.replaceChildren();
  block.filled = false;
}

const nearby = new IntersectionObserver(
  (entries) => entries.forEach(({ target, isIntersecting }) => (isIntersecting ? fill : empty)(blocks[target.dataset.b])),
  { rootMargin: "1500px 0px" },
);

function addBlock(article, first, end) {
  let lines = 1, column = 0; // the estimated height, for the scroll bar, until the block has been shown
  for (let i = first; i < end; i++) {
    const text = data.vocabulary[tokens[i]];
    column += text.length;
    if (text.includes("\n") || column > 90) { lines += 1; column = 0; }
    blockOf[i] = blocks.length;
  }
  const node = element("div", { className: "block", style: { "min-height": `${lines * 30}px` } });
  node.dataset.b = blocks.length;
  blocks.push({ first, end, node, filled: false });
  article.append(node);
  nearby.observe(node);
}

function addCompletion(c) {
  const prompt = data.prompts[data.promptOf[c]];
  heads[c] = [element("span"), element("span")];
  const head = element("p", {}, element("b", {}, `#${c + 1}`), element("span", {}, `${count(data.lengths[c])} tokens`), ...heads[c]);
  const article = element("article", { id: `c${c}` }, head,
    element("details", {}, element("summary", {}, prompt.trim().replace(/\s+/g, " ").slice(0, 300) || "prompt"), element("div", {}, prompt)));
  let first = starts[c];
  for (let i = first; i < starts[c + 1]; i++) {
    const size = i + 1 - first;
    if (i + 1 === starts[c + 1] || size === BLOCK_LIMIT || (size >= BLOCK_TOKENS && data.vocabulary[tokens[i]].includes("\n"))) {
      addBlock(article, first, i + 1);
      first = i + 1;
    }
  }
  return article;
}

// ---- Charts: each is drawn once, then moved or recolored when the share changes

function svg(parent, ...shapes) {
  parent.innerHTML = `<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">${shapes.join("")}</svg>`;
  return parent.firstChild;
}

const bars = (heights) => heights.map((h, i) => {
  const width = 100 / heights.length;
  return `M${(i * width).toFixed(2)} 100v${(-98 * h).toFixed(2)}h${(width * 0.86).toFixed(2)}V100z`;
}).join("");

const chartOf = (name) => document.querySelector(`[data-chart=${name}]`);
const curve = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${(100 - 98 * y).toFixed(2)}`).join("");

function drawHistogram() {
  const { entropy, order } = shown();
  const top = Math.max(...[...order.slice(0, 1000)].map((i) => entropy[i]).filter(Number.isFinite), 1e-6);
  const counts = new Float64Array(BINS);
  entropy.forEach((e) => { if (Number.isFinite(e)) counts[Math.min(BINS - 1, Math.floor((e / top) * BINS))] += 1; });
  const highest = Math.log1p(counts.reduce((a, b) => Math.max(a, b), 1));
  const path = bars([...counts].map((c) => Math.log1p(c) / highest));
  const threshold = entropy[order[state.k - 1]];
  const x = Number.isFinite(threshold) ? (100 * Math.max(threshold, 0)) / top : 100;
  svg(chartOf("histogram"),
    `<clipPath id="above"><rect x="${x}" y="0" width="${Math.max(0, 101 - x)}" height="100"/></clipPath>`,
    `<path class="bars" d="${path}"/><path class="bars on" clip-path="url(#above)" d="${path}"/>`,
    `<line class="at" x1="${x}" x2="${x}" y1="0" y2="100"/>`);
  byId("histogram-mean").textContent = `nats, mean ${nats(shown().sum / n)}; height is log count`;
  byId("histogram-end").textContent = top.toFixed(2);
}

function drawPositions() {
  const longest = data.lengths.reduce((a, b) => Math.max(a, b), 1);
  const width = Math.ceil(longest / BINS);
  const size = Math.ceil(longest / width);
  const all = new Float64Array(size), chosen = new Float64Array(size);
  for (let i = 0; i < n; i++) {
    const bin = Math.floor((i - starts[owner[i]]) / width);
    all[bin] += 1;
    if (isSelected(shown(), i)) chosen[bin] += 1;
  }
  const y = 100 - 98 * state.ratio;
  svg(chartOf("positions"), `<path class="bars on" d="${bars([...all].map((a, b) => chosen[b] / a))}"/>`,
    `<line class="guide" x1="0" x2="100" y1="${y}" y2="${y}"/>`);
  byId("positions-end").textContent = count(longest);
}

let byShare = []; // completions, the one with the highest share of selected tokens first
function drawSequences() {
  const share = shares(shown());
  byShare = [...share.keys()].sort((a, b) => share[b] - share[a]);
  const y = 100 - 98 * state.ratio;
  const heights = byShare.map((c) => share[c]);
  svg(chartOf("sequences"),
    heights.length <= 2 * BINS
      ? `<path class="bars on" d="${bars(heights)}"/>`
      : `<path class="bars on" d="M0 100${curve(heights.map((h, i) => [(100 * i) / (heights.length - 1), h])).replace("M", "L")}L100 100z"/>`,
    `<line class="guide" x1="0" x2="100" y1="${y}" y2="${y}"/>`);
}

function shares(model) { // the selected share of each completion's tokens
  const chosen = new Float64Array(data.lengths.length);
  for (let place = 0; place < state.k; place++) chosen[owner[model.order[place]]] += 1;
  return chosen.map((value, c) => value / data.lengths[c]);
}

// overlapUpTo[k]: the number of positions that are among the first k of both models.
const overlapUpTo = models.length < 2 ? null : (() => {
  const total = new Uint32Array(n + 1);
  for (let i = 0; i < n; i++) total[Math.max(models[0].rank[i], models[1].rank[i]) + 1] += 1;
  for (let k = 1; k <= n; k++) total[k] += total[k - 1];
  return total;
})();

function drawOverlap() {
  const share = (k) => overlapUpTo[k] / k;
  const points = Array.from({ length: 100 }, (_, i) => (i + 1) / 100).map((r) => [100 * r, share(selectedCount(r))]);
  const x = 100 * state.ratio;
  svg(chartOf("overlap"), `<line class="guide" x1="0" x2="100" y1="100" y2="2"/><path class="curve" d="${curve(points)}"/>`,
    `<line class="at" x1="${x}" x2="${x}" y1="0" y2="100"/>`);
  byId("overlap-now").textContent = percent(share(state.k));
  byId("overlap-chance").textContent = `by chance ${percent(state.k / n)}`;
}

// ---- Tables

const statistics = new Map(); // model -> mean entropy and positions of every token that occurs

function tokenStatistics(model) {
  if (!statistics.has(model)) {
    const times = new Float64Array(data.vocabulary.length), sum = new Float64Array(data.vocabulary.length);
    for (let i = 0; i < n; i++) { times[tokens[i]] += 1; sum[tokens[i]] += model.entropy[i]; }
    const ordered = [...times.keys()].filter((t) => times[t]).sort((a, b) => sum[b] / times[b] - sum[a] / times[a]);
    statistics.set(model, { times, sum, ordered });
  }
  return statistics.get(model);
}

function drawTable() {
  const model = shown();
  const { times, sum, ordered } = tokenStatistics(model);
  const frequent = ordered.filter((t) => times[t] >= state.least);
  const rows = state.highest ? frequent.slice(0, TABLE_ROWS) : frequent.slice(-TABLE_ROWS).reverse();
  const chosen = new Float64Array(data.vocabulary.length);
  for (let place = 0; place < state.k; place++) chosen[tokens[model.order[place]]] += 1;
  const top = frequent.length ? sum[frequent[0]] / times[frequent[0]] : 1;
  byId("tokens").replaceChildren(...rows.map((t) => {
    const mean = sum[t] / times[t];
    const next = () => goTo((tokens.indexOf(t, state.cursor + 1) + 1 || tokens.indexOf(t) + 1) - 1);
    return element("tr", {},
      element("td", {}, element("button", { type: "button", title: "Go to the next one", onclick: next }, visible(data.vocabulary[t]))),
      element("td", {}, count(times[t])),
      element("td", { className: "bar", style: { "--size": cssPercent(mean / top) } }, nats(mean)),
      element("td", {}, percent(chosen[t] / times[t], 0)));
  }));
}

// ---- Share, view, theme

// The expression of the paper's authors, which the op uses too.
const selectedCount = (ratio) => Math.min(n, Math.max(1, Math.trunc(n * ratio + 0.9999)));

function drawFacts() {
  const model = shown();
  let carried = 0;
  for (let place = 0; place < state.k; place++) carried += model.entropy[model.order[place]];
  const facts = {
    "begins at": [nats(model.entropy[model.order[state.k - 1]]), " nats"],
    tokens: [count(state.k), ` of ${count(n)}`],
    "of all entropy": [percent(model.sum ? carried / model.sum : 0, 0), ""],
  };
  byId("facts").replaceChildren(...Object.entries(facts).map(([name, [value, unit]]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, unit)))));
}

function drawHeads() {
  const model = shown(), share = shares(model);
  data.lengths.forEach((_, c) => {
    const [chosen, mean] = heads[c];
    chosen.textContent = `${percent(share[c])} selected`;
    mean.textContent = `mean entropy ${nats(model.meanOf[c])}`;
  });
}

function drawLegend() {
  const change = state.view === models.length;
  const ramp = element("span", { className: change ? "ramp change" : "ramp" });
  const marks = models.map((model, m) => element("span", {},
    element("span", { className: `t ${"ab"[m]}`, style: { "--h": 0 } }, " marked "),
    models.length > 1 ? ` selected by ${model.name}` : " selected"));
  byId("legend").replaceChildren(
    element("span", {}, change ? `entropy change −${scale.toFixed(1)}` : "entropy 0", ramp, `${change ? "+" : ""}${scale.toFixed(1)} nats and more`), ...marks);
}

function repaint() { blocks.forEach((block) => block.filled && block.node.childNodes.forEach(paint)); }

function drawAll() {
  state.k = selectedCount(state.ratio);
  byId("ratio").value = state.ratio;
  if (document.activeElement !== byId("percent")) byId("percent").value = +(100 * state.ratio).toFixed(3);
  repaint();
  for (const draw of [drawFacts, drawHistogram, drawPositions, drawSequences, drawTable, drawHeads]) draw();
  if (overlapUpTo) drawOverlap();
}

let frame = 0;
function setRatio(ratio) {
  if (!(ratio > 0 && ratio <= 1)) return;
  state.ratio = ratio;
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(drawAll);
}

// ---- The token under the pointer or the cursor

function describe(model, m, i) {
  const { alternatives: width } = model;
  const list = element("ol");
  for (let a = i * width; a < (i + 1) * width; a++) {
    const p = probability(model.topLogProb[a]);
    list.append(element("li", { className: model.topTokens[a] === tokens[i] ? "taken" : "", style: { "--size": cssPercent(p) } },
      element("span", {}, visible(data.vocabulary[model.topTokens[a]])), element("span", {}, percent(p))));
  }
  const facts = [["entropy", `${nats(model.entropy[i])} nats`], ["rank", count(model.rank[i] + 1)],
    ["probability", percent(probability(model.logProb[i]))]];
  return element("div", {}, ...(models.length > 1 ? [element("b", { className: m ? "second" : "first" }, model.name)] : []),
    element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])), list);
}

function showTip(span) {
  const i = +span.dataset.i, tip = byId("tip");
  tip.replaceChildren(
    element("div", { className: "token" }, visible(data.vocabulary[tokens[i]])),
    element("div", { className: "where" }, `token ${count(i - starts[owner[i]] + 1)} of completion ${owner[i] + 1}`),
    element("div", { className: "columns" }, ...models.map((model, m) => describe(model, m, i))));
  tip.hidden = false;
  const at = span.getClientRects()[0], box = tip.getBoundingClientRect();
  const below = at.bottom + 8;
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.width - 8))}px`;
  tip.style.top = `${below + box.height < innerHeight ? below : Math.max(8, at.top - box.height - 8)}px`;
}

function goTo(i) {
  if (!(i >= 0 && i < n)) return;
  const block = blocks[blockOf[i]];
  fill(block);
  const before = state.cursor;
  state.cursor = i;
  for (const at of [before, i]) {
    const span = at >= 0 && blocks[blockOf[at]].node.childNodes[at - blocks[blockOf[at]].first];
    if (span) paint(span);
  }
  const span = block.node.childNodes[i - block.first];
  span.scrollIntoView({ block: "center" });
  showTip(span);
}

const reading = byId("reading");
const hideTip = () => { byId("tip").hidden = true; };
reading.addEventListener("pointerover", (event) => {
  const span = event.target.closest(".t[data-i]");
  if (span) showTip(span); else hideTip();
});
reading.addEventListener("pointerleave", hideTip);
reading.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") hideTip();
  if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  let i = state.cursor + step;
  while (event.shiftKey && i >= 0 && i < n && !isSelected(shown(), i)) i += step;
  goTo(i);
});

const sequences = chartOf("sequences");
const completionAt = (event) => {
  const box = sequences.getBoundingClientRect();
  return byShare[Math.max(0, Math.min(byShare.length - 1, Math.floor(((event.clientX - box.left) / box.width) * byShare.length)))];
};
sequences.addEventListener("pointermove", (event) => { byId("sequence-now").textContent = `#${completionAt(event) + 1}`; });
sequences.addEventListener("click", (event) => byId(`c${completionAt(event)}`).scrollIntoView());

byId("ratio").addEventListener("input", (event) => setRatio(Number(event.target.value)));
byId("percent").addEventListener("input", (event) => setRatio(Number(event.target.value) / 100));
byId("least").addEventListener("input", (event) => { state.least = Math.max(1, Number(event.target.value)); drawTable(); });
byId("theme").addEventListener("click", () => {
  const root = document.documentElement.style;
  const dark = root.colorScheme ? root.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.colorScheme = dark ? "light" : "dark";
});

byId("models").append(...models.flatMap((model, m) => [
  ...(m ? [" and "] : []), element("span", { className: models.length > 1 ? ["first", "second"][m] : "" }, model.name)]),
  data.temperature === 1 ? "" : `, temperature ${data.temperature}`);
document.title = `Forking tokens: ${models.map((model) => model.name).join(" and ")}`;
byId("least").value = state.least;
choice(byId("table-order"), "order", ["highest", "lowest"], 0, (value) => { state.highest = value === 0; drawTable(); });
if (models.length > 1) {
  byId("views").hidden = byId("overlap").hidden = false;
  choice(byId("views"), "view", [...models.map((model) => model.name), "change"], 0, (value) => {
    state.view = value;
    drawLegend();
    drawAll();
  });
}
byId("completions").append(...data.lengths.map((_, c) => addCompletion(c)));
drawLegend();
drawAll();
// For scripts and tests: the selection of a model, one flag for each token.
window.entropyReport = { setRatio, selected: (m = 0) => Uint8Array.from(models[m].rank, (rank) => rank < state.k) };
