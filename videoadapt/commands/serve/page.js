// Sends each file to the page's own server and shows the lines that it answers: progress, then the answer.
"use strict";

const answers = document.getElementById("answers");
const card = document.getElementById("card");
const drop = document.getElementById("drop");
const input = document.getElementById("files");
const news = document.getElementById("news"); // read aloud, not shown
const maxMb = Number(document.body.dataset.maxMb);

history.replaceState(null, "", location.pathname); // the key is in a cookie now; screenshots need not show it

input.addEventListener("change", () => {
  start(input.files);
  input.value = ""; // so that the same file can be chosen again
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // otherwise the browser would open the file
    drop.classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  start(event.dataTransfer.files);
});

function start(files) {
  for (const file of files) answer(file);
}

async function answer(file) {
  const shown = card.content.cloneNode(true).firstElementChild;
  shown.querySelector("h2").textContent = file.name;
  shown.querySelector(".size").textContent = `${(file.size / 1e6).toFixed(2)} MB`;
  answers.prepend(shown);
  try {
    if (file.size > maxMb * 1e6) throw new Error(`it is larger than ${maxMb} MB (serve.max_mb)`);
    const response = await fetch(`videos?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    let last = { state: "progress" };
    for await (const line of lines(response.body)) show(shown, (last = JSON.parse(line)));
    if (last.state === "progress") throw new Error("the page's server gave no answer; its terminal may say why");
  } catch (error) {
    const lost = error instanceof TypeError; // what fetch throws without a connection
    show(shown, { state: "refused", text: lost ? "the page's server does not answer; has it ended?" : error.message });
  }
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts;
  }
}

function show(shown, { state, text }) {
  const body = shown.querySelector(".body");
  shown.dataset.state = state;
  if (state === "done") {
    body.innerHTML = text; // our own template, which escapes names
  } else {
    const line = document.createElement("p");
    line.className = state;
    line.textContent = state === "refused" ? `Refused: ${text}` : text;
    body.replaceChildren(line);
  }
  const said = body.querySelector(".best, .refused");
  if (said) news.textContent = `${shown.querySelector("h2").textContent}: ${said.textContent}`;
}
