"use strict";
// The page of awschat: it asks, shows answers while they are written, and keeps the list of conversations. Rules:
// 1. No text is ever parsed as HTML, so no question, answer, title or address can run a script.
// 2. A question keeps its Idempotency-Key until it has ended well: sending it again is always safe.
// 3. What names the subject, AWS, stands in index.html; how a status looks, in chat.css.

// ---- Stream reader: lift this function into your own front end ---------------------------------------------
/** Hands each event, {type, content, ...}, of a fetch() response to onEvent; returns the last, "end" or "error".
 *  Throws when the connection breaks before that: GET /chat/stream?session_id= then shows the turn again. */
async function readEvents(response, onEvent, silence = 20_000) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder(); // with stream: true it keeps the bytes of a character that was cut in two
  let rest = ""; // a line whose end has not arrived yet
  for (;;) {
    const watchdog = setTimeout(() => reader.cancel(), silence); // pings come every 4 s: this line is dead
    const { done, value } = await reader.read().finally(() => clearTimeout(watchdog));
    if (done) throw new Error("The connection closed before the answer ended.");
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue; // a ": ping" comment, or the blank line after an event
      const event = JSON.parse(line.slice(5));
      onEvent(event);
      if (event.type === "end" || event.type === "error") return event;
    }
  }
}

// ---- Markdown becomes elements ------------------------------------------------------------------------------
const $ = (id) => document.getElementById(id);
const copyOf = (template) => $(`${template}-template`).content.firstElementChild.cloneNode(true);

/** A new element with these properties and children. */
function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
/** The text as nodes: make(match) makes those of what fits the pattern, the rest stays text. */
function nodesOf(text, pattern, make) {
  const nodes = [];
  let at = 0;
  for (const match of text.matchAll(pattern)) {
    nodes.push(text.slice(at, match.index), make(match));
    at = match.index + match[0].length;
  }
  return [...nodes, text.slice(at)];
}

const anyOf = (...patterns) => patterns.map((pattern) => pattern.source).join("|");
const INLINE = new RegExp(anyOf(
  /(?<br>(?: {2,}|\\)\n|<br ?\/?>)|\\(?<escaped>[\\`*_~[\]|#<])/,
  /(?<ticks>`+)(?<code>.+?)(?<!`)\k<ticks>(?!`)/,
  /(?<![\w*/:])(?<mark>\*\*?|~~|_(?!_))(?=\S)(?<marked>.{1,2000}?)(?<=\S)\k<mark>(?!\*|(?<=_)\w)/,
  /!?\[(?<label>[^[\]]+)\]\((?<href>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?: "[^"]*")?\)/,
  /(?<url>https?:\/\/[^\s<>"'`|]*[^\s<>"'`|.,;:!?)\]*~])/,
), "gs");
const MARKS = { "*": "em", _: "em", "**": "strong", "~~": "del" };

/** The nodes of a paragraph, a cell or a heading. */
function inline(text, inLink = false) {
  return nodesOf(text, INLINE, ({ 0: source, groups: { br, escaped, code, mark, marked, label, href, url } }) => {
    if (br) return el("br");
    if (escaped) return escaped;
    if (code) return el("code", {}, code.trim());
    if (mark) return el(MARKS[mark], {}, ...inline(marked, inLink));
    if (inLink || !/^https?:\/\//i.test(href ?? url)) return source; // javascript: and the like stay text
    return el("a", { href: href ?? url, target: "_blank", rel: "noopener" }, ...inline(label ?? url, true));
  });
}

const listOf = (marker) => new RegExp(`([ \\t]*)${marker} .*(?:\\n+(?:\\1${marker} |[ \\t]+\\S).*)*`, "y");
const BLOCKS = [ // the first pattern that fits makes the block
  [/([ \t]*)(`{3,}|~{3,})([^\n`]*)(?:\n|$)(.*?)(?:(?<=\n)[ \t]*\2[`~]*[ \t]*(?=\n|$)|$)/ys, codeBlock],
  [/ {0,3}(#{1,6}) +(.*)/y, (match) => el(`h${Math.min(6, match[1].length + 2)}`, {}, ...inline(match[2]))],
  [/ {0,3}([-*_])(?: *\1){2,} *(?=\n|$)/y, () => el("hr")],
  [/(?: {0,3}>.*(?:\n|$))+/y, ([text], depth) => show(el("blockquote"), text.replace(/^ *> ?/gm, ""), depth + 1)],
  [/[^\n|]*\|.*\n *\|?(?: *:?-+:? *(?:\||(?=\n|$)))+ *(?=\n|$)(?:\n[^\n|]*\|.*)*/y, table],
  [listOf("[-*+]"), (match, depth) => el("ul", {}, ...listItems(match, depth))],
  [listOf("\\d{1,9}[.)]"), (match, depth) => el("ol", { start: parseInt(match[0]) }, ...listItems(match, depth))],
  [/.+(?:\n(?! *(?:[-*+] |1[.)] |#{1,6} |>|\||```|~~~)).+)*/y, ([text]) => el("p", {}, ...inline(text))],
];

/** Shows Markdown in the target and returns that. A block whose source is as before stays as it is: while an
 *  answer grows, only its last block is built again. More than five levels deep, everything is a paragraph. */
function show(target, text, depth = 0) {
  const source = text.replace(/\r\n?|[\u2028\u2029]/g, "\n").replace(/^[ \t]+$/gm, "").replace(/^\n+/, "");
  let count = 0;
  for (let at = 0, match; at < source.length; count++) {
    const fits = ([pattern]) => (match = Object.assign(pattern, { lastIndex: at }).exec(source));
    const [, make] = depth < 5 ? BLOCKS.find(fits) : BLOCKS.findLast(fits);
    const old = target.children[count];
    if (!old) target.append(make(match, depth));
    else if (old.source !== match[0]) old.replaceWith(make(match, depth));
    target.children[count].source = match[0];
    at += match[0].length;
    while (source[at] === "\n") at++;
  }
  while (target.children.length > count) target.lastChild.remove();
  return target;
}

const dedent = (text, width) => text.replace(new RegExp(`^[ \\t]{0,${width}}`, "gm"), "");

/** An item's other lines are set in as far as the first of them; "[x]" and "[ ]" begin a task. */
function listItems([source, indent], depth) {
  return source.split(new RegExp(`^${indent}(?:[-*+]|\\d{1,9}[.)]) `, "m")).slice(1).map((item) => {
    const text = item.replace(/^\[ \] /, "☐ ").replace(/^\[x\] /i, "☑ ");
    const inner = dedent(text, text.match(/\n([ \t]*)\S/)?.[1].length ?? 0);
    return show(el("li", /^[☐☑]/.test(text) ? { className: "task" } : {}), inner, depth + 1);
  });
}

function table([source]) {
  const cellsOf = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  const [head, marks, ...body] = source.split("\n").map(cellsOf);
  const sides = marks.map((mark) => ({ ":-:": "center", "-:": "right" })[mark.replace(/-+/, "-")] ?? "left");
  const row = (tag, cells) => el("tr", {}, ...cells.map((cell, column) =>
    el(tag, { className: sides[column] ?? "left" }, ...inline(cell.replaceAll("\\|", "|")))));
  const rows = [row("th", head), ...body.map((cells) => row("td", cells))];
  return el("div", { className: "table", tabIndex: 0 }, el("table", {}, ...rows)); // the keyboard scrolls it
}

function codeBlock([, indent, , info, text]) {
  const language = info.trim().split(/[\s{:,]/)[0].toLowerCase();
  const source = dedent(text, indent.length).replace(/\n$/, "");
  const code = el("code", {}, ...(/^(te?xt|)$/.test(language) ? [source] : nodesOf(source, COLOURS, colour)));
  const head = el("figcaption", {}, language || "text", copyOf("copy"));
  return el("figure", {}, head, el("pre", { tabIndex: 0 }, code));
}

const WORDS = "async|await|class|const|def|do|else|false|for|from|if|import|in|let|null|return|then|true|while";
const COLOURS = new RegExp(anyOf(
  /(?<comment>(?<!\S)(?:#|\/\/|--)(?!\S).*|(?<!\S)\/\*[^]*?\*\/|<!--[^]*?-->)/, // of one language or another
  /(?<name>^[ \t-]*[\w.:-]+(?=:(?:\s|$))|"[^"\n]*"(?=\s*:))|(?<number>(?<![\w/.-])\d[\w.]*)/,
  /(?<string>"""[^]*?"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`[^`]*`)/,
  new RegExp(`(?<word>(?<![\\w.-])(?:${WORDS})(?![\\w-]))`),
), "gim");
const colour = ({ 0: source, groups }) =>
  el("span", { className: Object.keys(groups).find((kind) => groups[kind]) }, source);

// ---- Service -----------------------------------------------------------------------------------------------
const BASE = new URL("..", document.currentScript.src); // of the service, also behind a proxy's prefix
const LOST = "The connection was lost.";
const newId = () => crypto.randomUUID?.() ?? crypto.getRandomValues(new Uint32Array(4)).join("-"); // plain http
const savedKey = () => sessionStorage.awschatKey ?? localStorage.awschatKey;
const forgetKey = () => [sessionStorage, localStorage].forEach((store) => store.removeItem("awschatKey"));

/** The response, or null for what does not exist (404). Throws a refusal as an Error with status and wait (s). */
async function call(method, path, body, turnKey) {
  const key = savedKey();
  const headers = { "Content-Type": "application/json", ...(turnKey && { "Idempotency-Key": turnKey }) };
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { method, headers, body: JSON.stringify(body), cache: "no-store", signal: view.abort.signal };
  const response = await fetch(new URL(path, BASE), options);
  const { ok, status } = response;
  if (ok || status === 404) return ok ? response : null;
  if (status === 401 && (await signIn(key))) return call(method, path, body, turnKey);
  const { content = `The service answered ${status}.` } = await response.json().catch(() => ({}));
  const reason = { 401: "Please sign in first.", 429: "Too many questions in a short time." }[status] ?? content;
  throw Object.assign(new Error(reason), { status, wait: Number(response.headers.get("Retry-After")) || 5 });
}
/** Shows a dialog of index.html; the value of the button that closed it, "" after Esc. */
function dialog(id) {
  $(id).returnValue = "";
  $(id).showModal();
  return new Promise((resolve) => { $(id).onclose = () => resolve($(id).returnValue); });
}
let signingIn = null; // the dialog's answer: requests that are refused together ask for a key once
/** Asks for a key, unless there is another by now than the one that was refused; false after Esc. */
async function signIn(refused) {
  if (savedKey() !== refused) return true;
  $("login").className = refused ? "refused" : "";
  signingIn ??= dialog("login").finally(() => { signingIn = null; });
  if (!(await signingIn)) return false;
  forgetKey();
  ($("remember").checked ? localStorage : sessionStorage).awschatKey = $("key").value;
  $("key").value = "";
  showSessions();
  return true;
}
/** Signs out, perhaps to use another key. What is on screen belongs to the old one, so the page begins anew. */
async function leave() {
  if (!(await dialog("leave"))) return;
  if ($("forget").checked) localStorage.removeItem("awschatSessions");
  forgetKey();
  location.reload();
}

// ---- Conversations: a list in this browser, because no route of the service lists them ----------------------
// [{id, title, at, pending}]: at, the time of the last question; pending, the {message, key} that has not ended well.
const AGES = [["Today", 0], ["Yesterday", 1], ["Last 7 days", 7], ["Last 30 days", 30], ["Older", Infinity]]; // days
const sessions = () => JSON.parse(localStorage.awschatSessions ?? "[]");
const find = (id) => sessions().find((session) => session.id === id);
const current = () => find(view.id);
const others = (id) => sessions().filter((session) => session.id !== id);
const update = (id, change) => keep([{ id, ...find(id), ...change }, ...others(id)]);
function keep(list) {
  localStorage.awschatSessions = JSON.stringify(list);
  showSessions();
}
/** Shows the list, newest first under its ages, as far as it fits the search. */
function showSessions() {
  const wanted = $("search").value.trim().toLowerCase();
  const midnight = new Date().setHours(0, 0, 0, 0);
  const ageOf = ({ at = 0 }) => AGES.find(([, days]) => at >= midnight - days * 86_400_000)[0];
  const found = sessions().filter(({ title }) => title.toLowerCase().includes(wanted));
  const groups = Map.groupBy(found.sort((one, other) => (other.at ?? 0) - (one.at ?? 0)), ageOf);
  $("sessions").replaceChildren(...[...groups].map(([age, list]) =>
    el("section", {}, el("h2", {}, age), el("ul", {}, ...list.map(sessionItem)))));
  $("title").textContent = current()?.title ?? "";
  document.title = `${$("title").textContent} · awschat`.replace(/^ · /, "");
  $("account").hidden = !savedKey();
}
function sessionItem({ id, title }) {
  const item = Object.assign(copyOf("session"), { session: id });
  const [link, ...buttons] = item.children;
  const ariaCurrent = id === view.id ? "page" : null;
  Object.assign(link, { href: `#${encodeURIComponent(id)}`, title, textContent: title, ariaCurrent });
  for (const button of buttons) button.ariaLabel = `${button.title}: ${title}`;
  return item;
}

async function rename({ session: id }) {
  $("name").value = find(id).title;
  const title = (await dialog("rename")) && $("name").value.trim();
  if (title) update(id, { title });
  $("question").focus();
}
async function erase({ session: id }) {
  $("erased").textContent = find(id).title;
  if (!(await dialog("erase"))) return;
  await call("DELETE", `chat?${new URLSearchParams({ session_id: id })}`);
  keep(others(id));
  if (id === view.id) location.hash = "";
}

// ---- The conversation on screen -----------------------------------------------------------------------------
let view = {}; // {id, abort, at, before}: at as in the list; before is the cursor of the earlier messages
const say = (text) => { $("status").textContent = text; };
const tell = ({ name, status, message }) => name === "AbortError" || say(status ? message : LOST);
const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };
const query = (more) => new URLSearchParams({ session_id: view.id, ...more });
const last = () => $("log").lastElementChild;
const running = () => last()?.status === "running";

/** Shows the conversation that the address names; without a name, an empty one. */
function open() {
  const first = !view.id;
  view.abort?.abort(); // stops watching; the turn itself goes on in the service
  const name = new URLSearchParams(`id=${location.hash.slice(1)}`).get("id"); // never throws, unlike decodeURI
  view = { id: name || newId(), abort: new AbortController(), at: find(name)?.at };
  $("log").replaceChildren();
  $("question").value = sessionStorage[draft()] ?? "";
  say("");
  showLength();
  showSessions();
  focusQuestion();
  if (name || first) older().then(name && resume).catch(tell); // asks for a key, if the service wants one
}
/** Shows the newest page of messages, at each later call the page before it. */
async function older() {
  const { scrollHeight, scrollTop } = $("scroll");
  const response = await call("GET", `chat?${query(view.before ? { before: view.before } : {})}`);
  const { messages, before } = await response?.json() ?? { messages: [] };
  if (!view.before && messages[0]?.role === "user") messages.unshift({ status: messages[0].status, content: "" });
  $("log").prepend(...messages.map(({ role, content, status }, at) => role === "user" ? article("question", content)
    : paint(article("answer", messages[at + 1]?.content), status, content)).reverse());
  $("scroll").scrollTop = $("scroll").scrollHeight - scrollHeight + scrollTop;
  view.before = before;
  $("older").hidden = !before;
}
/** Goes on with what a reload or a lost network interrupted; only what failed waits for its button. */
function resume() {
  const { title, pending } = current() ?? {};
  if (last() && !title) update(view.id, { title: titleOf(last().message), at: view.at = Date.now() });
  const shown = pending && [...$("log").children].slice(-2).filter(({ message }) => message === pending.message);
  for (const node of shown ?? []) node.key = pending.key;
  if (running()) follow(last(), true);
  else if (pending && !(shown.length && last().status === "failed")) ask(pending.message, pending.key);
  else if (!last()) say("This conversation does not exist, or you may not see it.");
}
/** Shows what another tab has changed: the list, and the conversation on screen if it was asked or erased there. */
function agree() {
  showSessions();
  if (running() || current()?.at === view.at) return;
  if (current()) open();
  else location.hash = "";
}

// ---- Turns --------------------------------------------------------------------------------------------------
const titleOf = (message) => message.replace(/\s+/g, " ").slice(0, 120);
function article(kind, message, key) {
  const node = Object.assign(copyOf(kind), { message, key });
  node.querySelector(".asked")?.append(message);
  return node;
}

/** Shows an answer as it is now. The view follows its end; whoever reads further up is left alone. */
function paint(answer, status, text, note = "") {
  const follows = atEnd();
  cancelAnimationFrame(answer.frame);
  clearTimeout(answer.timer);
  Object.assign(answer, { className: `answer ${status}`, status, text, ariaBusy: status === "running", frame: null });
  if (status === "running") answer.timer = setTimeout(() => answer.classList.add("silent"), 5000);
  show(answer.querySelector(".prose"), text);
  answer.querySelector(".note").textContent = note;
  if (follows) toEnd();
  $("newest").hidden = atEnd();
  return answer;
}

/** Shows the question and an answer that begins to run; under the key of a failed turn, in the place of that. */
function ask(message, key = newId()) {
  for (const other of document.querySelectorAll(".running")) other.stopped = true; // by the service: the last wins
  for (const old of [...$("log").children]) if (old.key === key) old.remove();
  view.at = Date.now();
  history.replaceState(null, "", `#${encodeURIComponent(view.id)}`);
  update(view.id, { title: current()?.title ?? titleOf(message), at: view.at, pending: { message, key } });
  $("log").append(article("question", message, key), paint(article("answer", message, key), "running", ""));
  toEnd();
  follow(last());
}

/** Shows a turn until it ends, over lost connections: sends the question until an answer begins, then watches. */
async function follow(answer, seen = false) {
  const { id, abort: { signal } } = view;
  let text = "";
  let end = null;
  say("Answering …");
  for (let tries = 0; !end && !answer.stopped && !signal.aborted; tries++) {
    try {
      const response = ((seen || text) && (await call("GET", `chat/stream?${query()}`)))
        || (await call("POST", "chat/stream", { session_id: id, message: answer.message }, answer.key));
      text = "";
      end = await readEvents(response, ({ type, content }) => {
        if (type !== "token") return;
        tries = 0;
        text += content;
        answer.frame ??= requestAnimationFrame(() => paint(answer, "running", text));
      });
    } catch (error) {
      if ([undefined, 429, 503].includes(error.status)) await countdown(answer, text, error, tries, signal);
      else end = { type: "error", content: error.message };
    }
  }
  if (!signal.aborted) finish(answer, text, end ?? { type: "end", content: text, status: "stopped" });
}
/** Waits before the next try; ends early on stop, or when the network is back. */
async function countdown(answer, text, { status, message, wait }, tries, signal) {
  const reason = status ? message : LOST;
  const online = new Promise((resolve) => { addEventListener("online", resolve, { once: true }); });
  say(reason); // once: a screen reader does not count seconds
  for (let left = status ? wait : Math.min(2 ** tries, 15); left > 0 && !answer.stopped && !signal.aborted; left--) {
    paint(answer, "running", text, `${reason} Trying again in ${left} s.`);
    await Promise.race([online, new Promise((resolve) => { setTimeout(resolve, 1000); })]);
  }
}

function finish(answer, text, { type, content, status }) {
  if (type !== "error") paint(answer, status, content);
  else paint(answer, "failed", text.endsWith(content) ? text.slice(0, -content.length) : text, content);
  if (answer.nextElementSibling) return; // a newer question took its place
  const pending = answer.key && current()?.pending?.key === answer.key;
  if (pending && type !== "error") update(view.id, { pending: undefined });
  say(status === "complete" ? "Answered." : `Answer ${answer.status}.`);
  $("speech").textContent = answer.querySelector(".prose").innerText; // for screen readers, once and whole
  setTimeout(() => { $("speech").textContent = ""; }, 2000);
  agree();
}

/** Stops the answer: what was said is kept; a question that still waits is not sent again. */
function stop() {
  if (!running()) return;
  last().stopped = true;
  call("POST", "chat/stop", { session_id: view.id }).catch(tell);
}
/** Copies the code or the answer that the button belongs to; the old command does so without https, too. */
function copy(answer, button) {
  const value = button.closest("figure")?.querySelector("code").textContent ?? answer.text;
  const box = button.parentNode.appendChild(el("textarea", { value, className: "unseen" }));
  box.select();
  document.execCommand("copy");
  box.remove();
  button.focus();
  button.lastElementChild.textContent = "Copied";
  setTimeout(() => { button.lastElementChild.textContent = "Copy"; }, 2000);
}

// ---- Asking -------------------------------------------------------------------------------------------------
const LIMIT = 4000; // characters that the service takes
const draft = () => `awschatDraft${location.hash}`; // of each conversation in this tab
const focusQuestion = () => matchMedia("(hover: hover)").matches && $("question").focus(); // else it opens a keyboard

/** Keeps the draft and counts when it matters: a text that is too long is never cut, but not sent either. */
function showLength() {
  const { value } = $("question");
  const length = [...value.trim()].length;
  if ($("newest").hidden && last()) toEnd(); // the box may have grown
  $("count").textContent = length > LIMIT * 0.9 ? `${length} of ${LIMIT}` : "";
  $("question").setCustomValidity(length > LIMIT ? `Too long by ${length - LIMIT} characters.` : "");
  sessionStorage[draft()] = value;
}
/** Puts a question into the box; Ctrl+Z brings back what was there. */
function edit({ message }) {
  $("question").focus();
  $("question").select();
  document.execCommand("insertText", false, message);
}
function send() {
  const message = $("question").value.trim();
  if (!message || !$("question").reportValidity() || (running() && last().message === message)) return;
  $("question").value = "";
  showLength();
  ask(message);
}
function press(event) {
  const { key, shiftKey, isComposing, target } = event;
  if (key === "Escape" && !document.querySelector("dialog[open], :popover-open")) stop();
  if (target !== $("question") || isComposing || shiftKey) return;
  if (key === "Enter") send();
  else if (key === "ArrowUp" && !target.value && last()) edit(last());
  else return;
  event.preventDefault();
}

// ---- Start --------------------------------------------------------------------------------------------------
const ACTIONS = { // what the buttons do, by their names: with the message or the session of the list, and the button
  copy, edit, erase, leave, older, rename, send, stop,
  again: ({ message }) => ask(message),
  retry: ({ message, key }) => ask(message, key),
  example: (none, { textContent }) => ask(textContent),
  newest: () => $("scroll").scrollTo({ top: $("scroll").scrollHeight, behavior: "smooth" }),
};
addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  ACTIONS[button?.name]?.(button.closest("article, .session"), button)?.catch(tell);
  if (target.closest("nav a")) $("nav").hidePopover();
  if (target.closest("#new, [name=example], [name=again], [name=retry], [name=send]")) focusQuestion();
});
$("scroll").onscroll = () => { $("newest").hidden = atEnd(); };
$("search").oninput = showSessions;
$("question").oninput = showLength;
addEventListener("keydown", press);
addEventListener("hashchange", open);
addEventListener("storage", ({ key, newValue }) => key === "awschatKey" && !newValue ? location.reload() : agree());
open();
call("GET", "ready").then((ready) => ready.json()).then(({ demo }) => { $("demo").hidden = !demo; }).catch(tell);
