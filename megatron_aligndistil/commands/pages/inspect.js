"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const card = $("card");
let at = {}; // what the address asks for: record, by, response, token, counted from 1
let pinned = null;

/* An element with attributes and children. Texts only ever become text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/* ---- numbers and texts ---- */

function number(value, signed = false) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const digits = size >= 100 ? size.toFixed(0) : size >= 10 ? size.toFixed(1) : size >= 0.0995 || size === 0 ? size.toFixed(2)
    : size >= 0.001 ? size.toFixed(4) : size.toExponential(1);
  return (value < 0 ? "−" : signed && value > 0 ? "+" : "") + digits;
}

function percent(share) {
  if (share === null) return "–";
  return share >= 0.001 ? (100 * share).toFixed(1) + "%" : share >= 0.0001 ? (100 * share).toFixed(2) + "%" : "<0.01%";
}

/* White space and control characters made visible, as nodes: `spaces` marks spaces too, `breaks` keeps line ends. */
function visible(text, { spaces = false, breaks = false } = {}) {
  const marks = { " ": "·", "\n": "⏎", "\t": "⇥", "\u007f": "␡" };
  return text.split(spaces ? /([\u0000- \u007f])/ : /([\u0000-\u001f\u007f])/).flatMap((piece, index) => {
    if (index % 2 === 0) return piece ? [piece] : [];
    const mark = make("span", { class: "mark" }, marks[piece] || String.fromCodePoint(0x2400 + piece.codePointAt(0)));
    return breaks && (piece === "\n" || piece === "\t") ? [mark, piece] : [mark];
  });
}

const textOf = (token) => data.tokens[token][0];
const isSpecial = (token) => data.tokens[token][1] === 1;
const isBytes = (text) => /^(.?<0x[0-9A-F]{2}>)+$/.test(text);

/* A token's text in its element; the space before a word stays outside, where no line end colours it. */
function fill(element, token) {
  const text = textOf(token);
  if (isSpecial(token)) element.classList.add("special");
  else if (isBytes(text)) element.classList.add("bytes");
  const [space] = text.match(/^ +(?=\S)/) || [""];
  element.append(...visible(text.slice(space.length), { spaces: !text.trim(), breaks: true }));
  return [space, element];
}

/* "α_t" with its index set as one. */
function maths(text) {
  return text.split(/_(\p{L}+)/u).map((part, index) => index % 2 ? make("sub", {}, part) : part);
}

function snippet(record, length = 90) {
  const text = record.prompt.filter((token) => !isSpecial(token)).map(textOf).join("").replace(/\s+/g, " ").trim();
  if (!text) return "(no prompt)";
  return text.length > length ? "…" + text.slice(-length) : text;
}

/* ---- colours ---- */

const measure = () => data.measures.find((each) => each.key === at.by);

function colour(value, { scale, signed }) {
  if (value === null || !scale) return "transparent";
  const strength = Math.min(Math.abs(value) / scale, 1) * 0.72;
  return `rgb(var(--${signed ? (value > 0 ? "more" : "less") : "size"}) / ${strength.toFixed(3)})`;
}

function paint() {
  const by = measure();
  for (const span of document.querySelectorAll(".token")) {
    span.style.backgroundColor = colour(responseOf(span).values[by.key][span.dataset.token], by);
  }
  const stops = by.signed ? [-1, -0.5, 0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
  $("scale").style.background = `linear-gradient(to right, ${stops.map((stop) => colour(stop * by.scale, by)).join(", ")})`;
  $("ticks").replaceChildren(...stops.map((stop) => make("span", {}, number(stop * by.scale, by.signed))));
  const beyond = by.scale ? "Full colour at the 98th percentile of this page, and beyond." : "It is 0 everywhere here.";
  $("legend").querySelector("figcaption").replaceChildren(make("b", {}, ...maths(by.name)), ": ", ...maths(by.meaning), `. ${beyond}`);
}

/* ---- the page ---- */

const record = () => data.records[at.record - 1];
const responseOf = (span) => record().responses[span.dataset.response];
const margin = (each) => {
  const sums = each.responses.map((response) => response.totals.reward[0]);
  return sums.length === 2 && sums.every((sum) => sum !== null) ? sums[0] - sums[1] : sums.length === 1 ? sums[0] : null;
};
const address = (number, by) => `#record=${number}&by=${by}`;
const preferred = (value) => make("span", { class: value > 0 ? "good" : "bad" }, number(value, true));

function showHead() {
  const pairs = data.records.filter((each) => each.responses.length === 2);
  const right = pairs.filter((each) => margin(each) > 0).length;
  $("summary").textContent = pairs.length
    ? `${data.source}: the ${data.measures[0].name} prefers the chosen response in ${right} of ${pairs.length} pairs.` : data.source;
  $("about").querySelector("dl").append(
    make("dt", {}, "teacher"), make("dd", {}, ...maths(data.teacher)),
    ...data.models.filter((model) => model.path).flatMap((model) => [make("dt", {}, model.name), make("dd", {}, model.path)]),
  );
  for (const each of data.measures) {
    const input = make("input", { type: "radio", name: "by", value: each.key });
    input.addEventListener("change", () => location.replace(address(at.record, each.key)));
    $("measures").append(make("label", { title: each.meaning }, input, make("span", {}, ...maths(each.name))));
  }
  $("records").append(...data.records.map((each, index) => make("li", {}, make("a", { "data-record": index + 1 },
    make("span", { class: "number" }, String(index + 1)),
    make("span", { class: "snippet", title: snippet(each, 400) }, snippet(each)),
    make("span", { class: "sum", title: each.responses.length === 2 ? `${data.measures[0].name}: chosen − rejected` : data.measures[0].name },
      margin(each) === null ? "–" : preferred(margin(each)))))));
}

function promptOf(each) {
  const text = make("div", { class: "text" }, ...each.prompt.flatMap((token) => fill(make("span"), token)));
  return make("details", { class: "prompt" }, make("summary", {}, `Prompt, ${each.prompt.length} tokens: ${snippet(each, 160)}`), text);
}

function totals(response) {
  const rows = [];
  const row = (name, [sum, mean], { summed = true, signed = false, rule = false } = {}) => rows.push(make("tr", rule ? { class: "rule" } : {},
    make("th", { scope: "row" }, ...maths(name)), make("td", {}, summed ? number(sum, signed) : ""), make("td", {}, number(mean, signed))));
  for (const each of data.measures) {
    row(each.name, response.totals[each.key], { summed: each.key === "reward" || each.key === "kl", signed: each.signed });
    if (each.key === "reward") row(`β0 × ${each.name}`, response.totals.reward.map((value) => value === null ? null : value * data.beta0), { signed: true });
  }
  data.models.forEach((model, index) => row(`log π(y), ${model.name}`, response.totals[model.key], { signed: true, rule: index === 0 }));
  return make("table", { class: "totals" },
    make("thead", {}, make("tr", {}, make("td"), make("th", { scope: "col" }, "sum"), make("th", { scope: "col" }, "per token"))),
    make("tbody", {}, ...rows));
}

function panel(response, index) {
  const text = make("div", { class: "text", role: "group", "aria-label": `${response.name}: arrow keys go from token to token` });
  response.tokens.forEach((token, place) => text.append(...fill(make("span", {
    class: "token", role: "button", tabindex: place ? -1 : 0, "data-response": index, "data-token": place,
  }), token)));
  return make("section", { class: "response" },
    make("h3", {}, response.name, make("span", { class: "dim" }, ` ${response.tokens.length} tokens`)), text, totals(response));
}

function showRecord() {
  const each = record();
  const verdict = each.responses.length === 2 && margin(each) !== null
    ? make("span", {}, `${data.measures[0].name}, chosen − rejected: `, preferred(margin(each)), ` nats; β0 × it: ${number(margin(each) * data.beta0, true)}`) : "";
  const step = (to, text) => to >= 1 && to <= data.records.length ? make("a", { href: address(to, at.by) }, text) : null;
  $("record").replaceChildren(
    make("div", { class: "head" }, make("h2", {}, `Record ${at.record}`), verdict,
      make("span", { class: "steps" }, step(at.record - 1, "← previous"), step(at.record + 1, "next →"))),
    promptOf(each), make("div", { class: "responses" }, ...each.responses.map(panel)));
}

/* ---- the card ---- */

function alternatives(response, place) {
  const own = response.tokens[place];
  const bar = (td, share) => {
    td.style.backgroundImage = "linear-gradient(rgb(var(--size) / .22), rgb(var(--size) / .22))";
    td.style.backgroundSize = `${(100 * (share || 0)).toFixed(1)}% 100%`;
    return td;
  };
  const cell = (token, share, className = "") => bar(make("td", { class: className }, make("div", {},
    make("code", {}, ...visible(textOf(token), { spaces: !isSpecial(token) })), make("span", {}, percent(share)))), share);
  const logprob = (model) => response.logprobs[model][place];
  const rows = [make("tr", { class: "own" }, make("th", { scope: "row" }, "here"), ...data.models.map((_, model) => cell(own, logprob(model) === null ? null : Math.exp(logprob(model)))))];
  for (let rank = 0; rank < response.top[0][place].length / 2; rank += 1) {
    rows.push(make("tr", {}, make("th", { scope: "row" }, String(rank + 1)), ...data.models.map((_, model) => {
      const [token, share] = response.top[model][place].slice(2 * rank, 2 * rank + 2);
      return cell(token, share, token === own ? "same" : "");
    })));
  }
  return make("table", {}, make("thead", {}, make("tr", {}, make("td"), ...data.models.map((model) => make("th", { scope: "col" }, model.name)))), make("tbody", {}, ...rows));
}

function show(span) {
  const response = responseOf(span), place = Number(span.dataset.token), token = response.tokens[place];
  const value = (name, text) => make("div", {}, make("dt", {}, ...maths(name)), make("dd", {}, text));
  const values = data.measures.map((each) => value(each.name, number(response.values[each.key][place], each.signed)));
  const alpha = response.values.alpha[place];
  if (alpha) values.push(value("weight β_t = β0/α_t", number(data.beta0 / alpha)));
  const close = make("button", { type: "button", "aria-label": "Close" }, "×");
  close.addEventListener("click", () => { unpin(); span.focus(); hide(); });
  card.replaceChildren(
    make("div", { class: "title" }, make("code", {}, ...visible(textOf(token), { spaces: !isSpecial(token) })),
      make("span", { class: "dim" }, `token ${place + 1} of ${response.tokens.length}, id ${token}`), close),
    make("dl", { class: "values" }, ...values), alternatives(response, place));
  document.querySelector(".token.shown")?.classList.remove("shown");
  span.classList.add("shown");
  span.setAttribute("aria-describedby", "card");
  card.hidden = false;
  const box = span.getClientRects()[0] || span.getBoundingClientRect(), size = card.getBoundingClientRect();
  const below = box.bottom + 8, above = box.top - size.height - 8;
  card.style.top = `${below + size.height <= innerHeight || above < 0 ? Math.max(8, Math.min(below, innerHeight - size.height - 8)) : above}px`;
  card.style.left = `${Math.max(8, Math.min(box.left - 20, innerWidth - size.width - 8))}px`;
}

function hide() {
  card.hidden = true;
  document.querySelector(".token.shown")?.classList.remove("shown");
}

function pin(span) {
  pinned = span;
  show(span);
  card.classList.add("pinned");
  // On a narrow screen the card keeps to the bottom, where it may lie over its token.
  const covered = card.getBoundingClientRect(), box = span.getBoundingClientRect();
  if (box.bottom > covered.top && box.top < covered.bottom) span.scrollIntoView({ block: "start" });
}
function unpin() { pinned = null; card.classList.remove("pinned"); }

function move(span, event) {
  const tokens = [...span.parentElement.children], index = tokens.indexOf(span);
  const to = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (to === undefined || !tokens[to]) return;
  event.preventDefault();
  if (pinned) unpin();
  span.tabIndex = -1;
  tokens[to].tabIndex = 0;
  tokens[to].focus();
}

const tokenOf = (event) => event.target instanceof Element ? event.target.closest(".token") : null;
document.addEventListener("pointerover", (event) => {
  if (pinned || event.pointerType === "touch") return;
  const span = tokenOf(event);
  if (span) show(span);
  else if (!event.target.closest(".response .text") && !document.activeElement?.matches(".token")) hide();
});
document.addEventListener("focusin", (event) => { const span = tokenOf(event); if (span && !pinned) show(span); });
document.addEventListener("focusout", () => { if (!pinned) hide(); });
document.addEventListener("click", (event) => {
  const span = tokenOf(event);
  if (span) { if (pinned === span) { unpin(); hide(); } else pin(span); }
  else if (pinned && !card.contains(event.target)) { unpin(); hide(); }
});
document.addEventListener("keydown", (event) => {
  const span = tokenOf(event);
  if (event.key === "Escape") { unpin(); hide(); }
  else if (span && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); if (pinned === span) unpin(); else pin(span); }
  else if (span) move(span, event);
});
document.addEventListener("scroll", () => { if (!card.hidden) { const span = document.querySelector(".token.shown"); if (span) show(span); } }, { passive: true });

/* ---- the address ---- */

function follow() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const within = (value, most) => Math.min(Math.max(Number.parseInt(value, 10) || 1, 1), most);
  const shown = at.record;
  at = {
    record: within(asked.get("record"), data.records.length),
    by: data.measures.some((each) => each.key === asked.get("by")) ? asked.get("by") : at.by || data.measures[0].key,
  };
  if (shown !== at.record) { unpin(); hide(); showRecord(); }
  document.querySelector(`#measures input[value=${at.by}]`).checked = true;
  for (const link of document.querySelectorAll("#records a")) {
    link.href = address(link.dataset.record, at.by);
    if (Number(link.dataset.record) !== at.record) { link.removeAttribute("aria-current"); continue; }
    link.setAttribute("aria-current", "true");
    const list = link.closest("nav"), top = link.offsetTop;
    if (top < list.scrollTop || top + link.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 2;
  }
  paint();
  if (asked.has("token")) {
    const index = within(asked.get("response"), record().responses.length) - 1;
    const place = within(asked.get("token"), record().responses[index].tokens.length) - 1;
    const span = document.querySelector(`.token[data-response="${index}"][data-token="${place}"]`);
    span.scrollIntoView({ block: "center" });
    pin(span);
  }
}

showHead();
follow();
addEventListener("hashchange", follow);
