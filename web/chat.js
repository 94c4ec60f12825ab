"use strict";
// The page of awschat: it asks, shows answers while they are written, and keeps a list of conversations.
// Read "Start", at the end, first: what a click and a key do. Then "Turns", which asks and shows the answer,
// and what it stands on: "Stream reader", "Service". "Markdown", text into elements, stands alone.
// 1. No text is ever parsed as HTML, so no question, answer, title or address can run a script.
// 2. A question keeps its Idempotency-Key until it has ended well: sending it again is always safe.
// 3. What names the subject, AWS, stands in index.html; how a status looks, in chat.css.

// ---- Stream reader: lift this function into your own front end ----
/** Hands each event, {type, content, ...}, of a response to onEvent; returns the last, "end" or "error".
 *  Throws when the connection breaks before that: GET /chat/stream?session_id= then shows the turn again. */
async function readEvents(response, onEvent, silence = 20_000) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder(); // with stream: true it keeps the bytes of half a character
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

// ---- Markdown ----
const $ = (id) => document.getElementById(id);

function clone(name, properties) {
  const node = $(`${name}-template`).content.firstElementChild.cloneNode(true);
  node.querySelector(".asked")?.append(properties.message);
  return Object.assign(node, properties);
}

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Tokens and the text before each; a match without a token is the end. build(groups) makes the token's node.
const tokenPattern = (flags, ...tokens) => new RegExp(
  `(?<before>[^]*?)(?:(?<token>${tokens.map(({ source }) => source).join("|")})|(?![^]))`, flags);
const tokenize = (text, pattern, build) =>
  [...text.matchAll(pattern)].flatMap(({ groups }) => [groups.before, groups.token ? build(groups) : ""]);
const INLINE = tokenPattern("gs",
  /(?<br>(?: {2,}|\\)\n|<br ?\/?>)|\\(?<escaped>[\\`*_~[\]|#<])/,
  /(?<ticks>`+)(?<code>.+?)(?<!`)\k<ticks>(?!`)/,
  /(?<![\w*/:])(?<mark>\*\*?|~~|_(?!_))(?=\S)(?<marked>.{1,2000}?)(?<=\S)\k<mark>(?!\*|(?<=_)\w)/,
  /!?\[(?<label>[^[\]]+)\]\((?<href>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?: "[^"]*")?\)/,
  /(?<url>https?:\/\/[^\s<>"'`|]*[^\s<>"'`|.,;:!?)\]*~])/,
);

function inline(text, inLink = false) {
  return tokenize(text, INLINE, ({ token, br, escaped, code, mark, marked, label, url, href = url }) => {
    if (br) return el("br");
    if (escaped) return escaped;
    if (code) return el("code", {}, code.trim());
    if (mark) return el({ "*": "em", _: "em", "**": "strong" }[mark] ?? "del", {}, ...inline(marked, inLink));
    if (inLink || !/^https?:\/\//i.test(href)) return token; // javascript: and the like stay text
    return el("a", { href, target: "_blank", rel: "noopener" }, ...inline(label ?? url, true));
  });
}

const dedent = (text, width) => text.replace(new RegExp(`^[ \\t]{0,${width}}`, "gm"), "");
const listOf = (marker) => new RegExp(`([ \\t]*)${marker} .*(?:\\n+(?:\\1${marker} |[ \\t]+\\S).*)*`, "y");
// The first pattern that fits makes the block. Three levels of headings rank alike: then none is left out.
const BLOCKS = [
  [/([ \t]*)(`{3,}|~{3,})([^\n`]*)(?:\n|$)(.*?)(?:(?<=\n)[ \t]*\2[`~]*[ \t]*(?=\n|$)|$)/ys, codeBlock],
  [/ {0,3}(#{1,6}) +(.*)/y, ([, { length: level }, text]) =>
    el(`h${Math.max(3, level)}`, { className: `level${level}` }, ...inline(text))],
  [/ {0,3}([-*_])(?: *\1){2,} *(?=\n|$)/y, () => el("hr")],
  [/(?: *>.*(\n|$))+/y, ([all], depth) => render(el("blockquote"), all.replace(/^ *> ?/gm, ""), depth + 1)],
  [/[^\n|]*\|.*\n *\|?(?: *:?-+:? *(?:\||(?=\n|$)))+ *(?=\n|$)(?:\n[^\n|]*\|.*)*/y, table],
  [listOf("[-*+]"), (match, depth) => el("ul", {}, ...items(match, depth))],
  [listOf("\\d{1,9}[.)]"), (match, depth) => el("ol", { start: parseInt(match[0]) }, ...items(match, depth))],
  [/.+(?:\n(?! *(?:[-*+] |1[.)] |#{1,6} |>|\||```|~~~)).+)*/y, ([text]) => el("p", {}, ...inline(text))],
];

/** Shows Markdown in the target and returns that. What is as before stays: an answer grows at its end. */
function render(target, text, depth = 0) {
  const source = text.replace(/\r\n?|[\u2028\u2029]/g, "\n").replace(/^[ \t]+$/gm, "").replace(/^\n+/, "");
  let position = 0;
  let count = 0;
  for (; position < source.length; count++) {
    let match = null;
    const fits = ([pattern]) => (match = Object.assign(pattern, { lastIndex: position }).exec(source));
    const [, build] = (depth < 5 ? BLOCKS : BLOCKS.slice(-1)).find(fits);
    const old = target.children[count] ?? target.appendChild(el("p"));
    if (old.source !== match[0]) old.replaceWith(Object.assign(build(match, depth), { source: match[0] }));
    position += match[0].length;
    while (source[position] === "\n") position++;
  }
  while (target.children.length > count) target.lastChild.remove();
  return target;
}

/** An item's other lines are set in as far as the first of them; "[x]" and "[ ]" begin a task. */
function items([source, indent], depth) {
  return source.split(new RegExp(`^${indent}(?:[-*+]|\\d{1,9}[.)]) `, "m")).slice(1).map((item) => {
    const text = item.replace(/^\[ \] /, "☐ ").replace(/^\[x\] /i, "☑ ");
    const width = text.match(/\n([ \t]*)\S/)?.[1].length ?? 0;
    return render(el("li", /^[☐☑]/.test(text) && { className: "task" }), dedent(text, width), depth + 1);
  });
}

function table([source]) {
  const cellsOf = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());
  const [head, marks, ...body] = source.split("\n").map(cellsOf);
  const sides = marks.map((mark) => ({ ":-:": "center", "-:": "right" })[mark.replace(/-+/, "-")]);
  const row = (tag, cells) => el("tr", {}, ...cells.map((cell, column) =>
    el(tag, { className: sides[column] ?? "left" }, ...inline(cell.replaceAll("\\|", "|")))));
  const rows = body.map((cells) => row("td", cells));
  return el("div", { className: "table", tabIndex: 0 }, el("table", {}, row("th", head), ...rows));
}

const COLOURS = tokenPattern("gim", // of one language or another
  /(?<comment>(?<!\S)(?:#|\/\/|--)(?!\S).*|(?<!\S)\/\*[^]*?\*\/|<!--[^]*?-->)/,
  /(?<name>^[ \t-]*[\w.:-]+(?=:(?:\s|$))|"[^"\n]*"(?=\s*:))|(?<number>(?<![\w/.-])\d[\w.]*)/,
  /(?<string>"""[^]*?"""|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'|`[^`]*`)/,
  /(?<![.-])\b(?<word>await|class|const|def|else|false|for|from|if|import|in|let|null|return|true)\b(?!-)/,
);
const colour = ({ before, token, ...kinds }) =>
  el("span", { className: Object.keys(kinds).find((kind) => kinds[kind]) }, token);

function codeBlock([, indent, , info, text]) {
  const language = info.trim().split(/[\s{:,]/)[0].toLowerCase() || "text";
  const source = dedent(text, indent.length).replace(/\n$/, "");
  const code = /^te?xt$/.test(language) ? [source] : tokenize(source, COLOURS, colour);
  const caption = el("figcaption", {}, language, clone("copy"));
  return el("figure", {}, caption, el("pre", { tabIndex: 0 }, el("code", {}, ...code)));
}

// ---- Service ----
const REASONS = { 401: "Please sign in first.", 429: "Too many questions in a short time." };
const reasonOf = ({ status, message }) => status ? REASONS[status] ?? message : "The connection was lost.";
const newId = () => crypto.randomUUID?.() ?? crypto.getRandomValues(new Uint32Array(4)).join("-"); // no https
const savedKey = () => sessionStorage.awschatKey ?? localStorage.awschatKey;
const forgetKey = () => [sessionStorage, localStorage].forEach((store) => store.removeItem("awschatKey"));

/** The response, or null for what does not exist. Throws a refusal as an Error with status and wait (s). */
async function request(method, path, body, turnKey) {
  const key = savedKey();
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  if (turnKey) headers["Idempotency-Key"] = turnKey;
  const reply = await fetch(path, { method, headers, body: JSON.stringify(body), signal: view.abort.signal });
  const { ok, status } = reply;
  if (ok) return reply;
  if (status === 404) return null;
  if (status === 401 && (await signIn(key))) return request(method, path, body, turnKey);
  const { content = `The service answered ${status}.` } = await reply.json().catch(() => ({}));
  throw Object.assign(new Error(content), { status, wait: Number(reply.headers.get("Retry-After")) || 5 });
}

/** Shows a dialog of index.html; the value of the button that closed it, "" after Esc. */
async function showDialog(id) {
  $(id).returnValue = "";
  $(id).showModal(); // does nothing if it is open: then all who wait get the same answer
  await new Promise((resolve) => { $(id).addEventListener("close", resolve, { once: true }); });
  return $(id).returnValue;
}

/** Asks for a key, unless there is another by now than the one that was refused; false after Esc. */
async function signIn(refused) {
  if (savedKey() !== refused) return true;
  $("login").className = refused ? "refused" : "";
  $("key").value = "";
  if (!(await showDialog("login"))) return false;
  forgetKey();
  ($("remember").checked ? localStorage : sessionStorage).awschatKey = $("key").value;
  renderList();
  return true;
}

/** Signs out, perhaps to use another key. What is on screen belongs to the old one: the page begins anew. */
async function leave() {
  if (!(await showDialog("leave"))) return;
  forgetKey(); // first: then no other tab reads again what it knows
  if ($("forget").checked) localStorage.removeItem("awschatSessions");
  location.reload();
}

// ---- List: it is kept in this browser, because no route of the service lists sessions ----
// [{id, title, at, pending}]: at, the last question's time; pending, {message, key} that has not ended well.
const sessions = () => JSON.parse(localStorage.awschatSessions ?? "[]");
const find = (id = view.id) => sessions().find((session) => session.id === id);
const others = (id) => sessions().filter((session) => session.id !== id);
const update = (id, change) => save([{ id, ...find(id), ...change }, ...others(id)]);
const AGES = { Today: 0, Yesterday: 1, "Last 7 days": 7, "Last 30 days": 30, Older: Infinity }; // days ago

function save(list) {
  localStorage.awschatSessions = JSON.stringify(list);
  renderList();
}

/** Shows the list, newest first under its ages, as far as its titles fit the search. */
function renderList() {
  const wanted = $("search").value.trim().toLowerCase();
  const midnight = new Date().setHours(0, 0, 0, 0);
  const ageOf = ({ at = 0 }) => Object.keys(AGES).find((age) => at >= midnight - AGES[age] * 86_400_000);
  const found = sessions().filter(({ title }) => title.toLowerCase().includes(wanted));
  const groups = Map.groupBy(found.sort((one, other) => (other.at ?? 0) - (one.at ?? 0)), ageOf);
  $("sessions").replaceChildren(...[...groups].map(([age, list]) =>
    el("section", {}, el("h2", {}, age), el("ul", {}, ...list.map(listItem)))));
  $("title").textContent = find()?.title ?? "";
  document.title = `${$("title").textContent} · awschat`.replace(/^ · /, "");
  $("account").hidden = !savedKey();
}

function listItem({ id, title }) {
  const item = clone("session", { session: id });
  const [link, ...buttons] = item.children;
  const ariaCurrent = id === view.id ? "page" : null;
  Object.assign(link, { href: `#${encodeURIComponent(id)}`, title, textContent: title, ariaCurrent });
  for (const button of buttons) button.ariaLabel = `${button.title}: ${title}`;
  return item;
}

async function rename({ session: id }) {
  $("name").value = find(id).title;
  const title = (await showDialog("rename")) && $("name").value.trim();
  if (title) update(id, { title });
  $("question").focus();
}

async function erase({ session: id }) {
  $("erased").textContent = find(id).title;
  if (!(await showDialog("erase"))) return;
  await request("DELETE", `chat?${new URLSearchParams({ session_id: id })}`);
  save(others(id));
  if (id === view.id) location.hash = "";
}

// ---- Conversation ----
let view = {}; // {id, abort, at, before}: at as in the list; before is the cursor of the earlier messages
const setStatus = (text) => { $("status").textContent = text; };
const report = (error) => error.name === "AbortError" || setStatus(reasonOf(error));
const atEnd = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };
const newest = () => $("scroll").scrollTo({ top: $("scroll").scrollHeight, behavior: "smooth" });
const query = (more) => new URLSearchParams({ session_id: view.id, ...more });
const lastAnswer = () => $("log").lastElementChild;
const running = () => lastAnswer()?.status === "running";

/** Shows the conversation that the address names; without a name, an empty one. */
function openConversation() {
  view.abort?.abort(); // stops watching; the turn itself goes on in the service
  const name = new URLSearchParams(`id=${location.hash.slice(1)}`).get("id"); // never throws
  view = { id: name || newId(), abort: new AbortController(), at: find(name)?.at };
  $("log").replaceChildren();
  $("question").value = sessionStorage[draftName()] ?? "";
  setStatus("");
  draftChanged();
  renderList();
  focusQuestion();
  older().then(name && resume).catch(report); // asks for a key, if the service wants one
}

/** Shows the newest page of messages, at each later call the page before it. */
async function older() {
  const { scrollHeight, scrollTop } = $("scroll");
  const response = await request("GET", `chat?${query(view.before ? { before: view.before } : {})}`);
  const { messages, before } = (await response?.json()) ?? { messages: [] };
  if (!view.before && messages[0]?.role === "user") messages.unshift({ status: "running", content: "" });
  $("log").prepend(...messages.map(({ role, content, status }, at) => role === "user"
    ? clone("question", { message: content })
    : renderAnswer(clone("answer", { message: messages[at + 1]?.content }), status, content)).reverse());
  $("scroll").scrollTop = $("scroll").scrollHeight - scrollHeight + scrollTop;
  view.before = before;
  $("older").hidden = !before;
}

/** Goes on with what a reload or a lost network interrupted; only what failed waits for its button. */
function resume() {
  const { title, pending } = find() ?? {};
  const answer = lastAnswer();
  if (answer && !title) update(view.id, { title: answer.message.slice(0, 120), at: view.at = Date.now() });
  if (pending && answer?.message === pending.message) answer.key = pending.key;
  if (running()) stream(answer);
  else if (pending && !(answer?.key && answer.status === "failed")) ask(pending.message, pending.key);
  else if (!answer) setStatus("This conversation does not exist, or you may not see it.");
}

/** Shows what another tab has changed: who is signed in, the list, and the conversation on screen. */
function syncTabs() {
  if (!$("account").hidden && !savedKey()) location.reload();
  renderList();
  if (!running() && find()?.at !== view.at) openConversation();
}

/** Shows an answer as it is now. The view follows its end; whoever reads further up is left alone. */
function renderAnswer(answer, status, text, note = "") {
  const follows = atEnd();
  clearTimeout(answer.timer);
  Object.assign(answer, { className: `answer ${status}`, status, text, ariaBusy: status === "running" });
  if (status === "running") answer.timer = setTimeout(() => answer.classList.add("silent"), 5000);
  render(answer.querySelector(".prose"), text);
  answer.querySelector(".note").textContent = note;
  if (follows) toEnd();
  return answer;
}

// ---- Turns ----
/** Shows the question and an answer that begins to run; under a failed turn's key, in the place of that. */
function ask(message, key = newId()) {
  const old = lastAnswer();
  if (running()) old.stopped = true; // by the service: the last question wins
  if (old?.key === key) for (const node of [old.previousSibling, old]) node.remove();
  view.at = Date.now();
  history.replaceState(null, "", `#${encodeURIComponent(view.id)}`);
  const { title = message.slice(0, 120) } = find() ?? {};
  update(view.id, { title, at: view.at, pending: { message, key } });
  const answer = renderAnswer(clone("answer", { message, key }), "running", "");
  $("log").append(clone("question", { message }), answer);
  toEnd();
  stream(answer);
}

const again = ({ status, message, key }) => ask(message, status === "failed" ? key : undefined);
const example = (none, { textContent }) => ask(textContent);

/** Shows a turn until it ends, over lost connections: sent again under its key, a question joins its turn. */
async function stream(answer) {
  const { signal } = view.abort;
  const body = { session_id: view.id, message: answer.message };
  let text = "";
  let tries = 0;
  let status = null;
  setStatus("Answering …");
  while (!status && !answer.stopped && !signal.aborted) {
    try {
      const asked = answer.key && (await request("POST", "chat/stream", body, answer.key));
      const response = asked || (await request("GET", `chat/stream?${query()}`)); // it was asked elsewhere
      text = "";
      const end = await readEvents(response, ({ type, content }) => {
        tries = 0;
        if (type === "token") renderAnswer(answer, "running", text += content);
      });
      if (end.type === "end") text = end.content;
      status = end.status;
    } catch (error) {
      if (error.wait && ![429, 503].includes(error.status)) status = "failed";
      if (status) text += `\n\n${reasonOf(error)}`;
      else await waitToRetry(answer, text, error, tries++, signal);
    }
  }
  if (!signal.aborted) finish(renderAnswer(answer, status ?? "stopped", text));
}

/** Waits before the next try; ends early on stop, or when the network is back. */
async function waitToRetry(answer, text, error, tries, signal) {
  const reason = reasonOf(error);
  let left = error.wait ?? Math.min(2 ** tries, 15);
  const online = new Promise((resolve) => { addEventListener("online", resolve, { once: true }); });
  setStatus(reason); // once: a screen reader does not count seconds
  for (; left > 0 && !answer.stopped && !signal.aborted; left--) {
    renderAnswer(answer, "running", text, `${reason} Trying again in ${left} s.`);
    await Promise.race([online, new Promise((resolve) => { setTimeout(resolve, 1000); })]);
  }
}

function finish(answer) {
  if (answer !== lastAnswer()) return; // a newer question took its place
  const { key, status } = answer;
  if (key && key === find()?.pending?.key && status !== "failed") update(view.id, { pending: undefined });
  setStatus(status === "complete" ? "Answered." : `Answer ${status}.`);
  $("speech").textContent = answer.querySelector(".prose").innerText; // for screen readers, once and whole
  setTimeout(() => { $("speech").textContent = ""; }, 2000);
  syncTabs();
}

/** Stops the answer: what was said is kept; a question that still waits is not sent again. */
function stop() {
  lastAnswer().stopped = true;
  request("POST", "chat/stop", { session_id: view.id }).catch(report);
}

function copy(answer, button) {
  const value = button.closest("figure")?.querySelector("code").textContent ?? answer.text;
  const box = button.parentNode.appendChild(el("textarea", { value, className: "unseen" }));
  box.select();
  document.execCommand("copy"); // the old command does so without https, too
  box.remove();
  button.focus();
  button.lastElementChild.textContent = "Copied";
  setTimeout(() => { button.lastElementChild.textContent = "Copy"; }, 2000);
}

// ---- Asking ----
const LIMIT = 4000; // characters that the service takes
const focusQuestion = () => matchMedia("(hover: hover)").matches && $("question").focus(); // no keyboard
const draftName = () => `awschatDraft${location.hash}`; // of each conversation in this tab

/** Keeps the draft and counts when it matters: a text that is too long is never cut, but not sent either. */
function draftChanged() {
  const { value } = $("question");
  const length = [...value.trim()].length;
  if ($("newest").hidden && lastAnswer()) toEnd(); // the box may have grown
  $("count").textContent = length > LIMIT * 0.9 ? `${length} of ${LIMIT}` : "";
  $("question").setCustomValidity(length > LIMIT ? `Too long by ${length - LIMIT} characters.` : "");
  sessionStorage[draftName()] = value;
}

function edit({ message }) {
  $("question").focus();
  $("question").select();
  document.execCommand("insertText", false, message); // Ctrl+Z brings back what was there
}

function send() {
  const message = $("question").value.trim();
  if (!message || !$("question").reportValidity() || (running() && lastAnswer().message === message)) return;
  $("question").value = "";
  draftChanged();
  ask(message);
}

function pressKey(event) {
  const { key, shiftKey, isComposing, target } = event;
  if (key === "Escape" && running() && !document.querySelector("dialog[open], :popover-open")) stop();
  if (target !== $("question") || isComposing || shiftKey) return;
  if (key === "Enter") send();
  else if (key === "ArrowUp" && !target.value && lastAnswer()) edit(lastAnswer());
  else return;
  event.preventDefault();
}

// ---- Start ----
// What the buttons do, by their names. They get the message or the list's item around them, and themselves.
const ACTIONS = { again, copy, edit, erase, example, leave, newest, older, rename, send, stop };
addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  ACTIONS[button?.name]?.(button.closest("article, .session"), button)?.catch(report);
  if (target.closest("nav a")) $("nav").hidePopover();
  if (target.closest("#new, [name=example], [name=again], [name=send]")) focusQuestion();
});
addEventListener("keydown", pressKey);
addEventListener("hashchange", openConversation);
addEventListener("storage", syncTabs);
$("scroll").onscroll = () => { $("newest").hidden = atEnd(); };
$("search").oninput = renderList;
$("question").oninput = draftChanged;
openConversation();
request("GET", "ready").then((it) => it.json()).then(({ demo }) => { $("demo").hidden = !demo; }, report);
