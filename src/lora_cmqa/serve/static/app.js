// One question, answered by the base and up to three adapters from one batch, side by side as it is written.
"use strict";

const WORDS = {
  en: {
    title: "Base and adapters, side by side", who: "Who answers (the base and up to three adapters)",
    question: "Question", length: "At most so many tokens", temperature: "Temperature (0: the same every time)",
    key: "Key", send: "Ask", stop: "Stop", other: "中文", base: "base", refused: "refused",
    none: "Choose at least one.", many: "At most four are compared.", lost: "The connection was lost: ",
    needKey: "This server asks for a key.", flags: "Holds a dose or a prescription's rhythm.", cut: "cut at the length",
  },
  zh: {
    title: "基座与适配器并排作答", who: "由谁回答（基座和最多三个适配器）",
    question: "问题", length: "最多多少词元", temperature: "温度（0：每次相同）",
    key: "密钥", send: "提问", stop: "停止", other: "English", base: "基座", refused: "未通过检查",
    none: "请至少选择一个。", many: "最多同时比较四个。", lost: "连接中断：",
    needKey: "此服务需要密钥。", flags: "含有剂量或用法。", cut: "达到长度上限",
  },
};

const at = (id) => document.getElementById(id);
let language = (localStorage.getItem("language") || navigator.language || "en").startsWith("zh") ? "zh" : "en";
let models = [];
let running = null;

const say = (word) => WORDS[language][word];

function make(kind, text, className) {
  const element = document.createElement(kind);
  if (text !== undefined) element.textContent = text; // text only: no answer becomes markup
  if (className) element.className = className;
  return element;
}

function show(id, text) {
  at(id).textContent = text || "";
  at(id).hidden = !text;
}

function translate() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-say]")) element.textContent = say(element.dataset.say);
  at("language").textContent = say("other");
  listModels();
}

function headers() {
  const key = at("key").value.trim();
  return key ? { "content-type": "application/json", authorization: `Bearer ${key}` } : { "content-type": "application/json" };
}

async function loadModels() {
  const response = await fetch("/v1/models", { headers: headers() });
  if (response.status === 401) {
    at("key-row").hidden = false;
    show("problem", say("needKey"));
    return;
  }
  show("problem", "");
  models = (await response.json()).data;
  listModels();
}

function listModels() {
  const chosen = new Set(chosenModels());
  const list = models.map((model, i) => {
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.value = model.id;
    box.disabled = Boolean(model.refused);
    box.checked = chosen.size ? chosen.has(model.id) : i < 2 && !model.refused;
    const more = model.parent === null ? ` (${say("base")})` : model.refused ? ` (${say("refused")})` : "";
    label.append(box, ` ${model.id}${more}`);
    label.title = model.refused || model.digest || "";
    return label;
  });
  at("models").replaceChildren(...list);
}

const chosenModels = () => [...document.querySelectorAll("#models input:checked")].map((box) => box.value);

// Server-sent events from a POST: lines "data: {...}", an empty line after each.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

function place(answer) {
  const article = make("article");
  const digest = answer.adapter.digest ? answer.adapter.digest.slice(0, 12) : "";
  const text = make("p");
  const after = make("small");
  article.append(make("h2", answer.model), make("small", digest), text, after);
  at("answers").append(article);
  return { text, after };
}

async function ask(event) {
  event.preventDefault();
  const names = chosenModels();
  show("problem", names.length === 0 ? say("none") : names.length > 4 ? say("many") : "");
  if (names.length === 0 || names.length > 4) return;
  at("answers").replaceChildren();
  show("emergency", "");
  at("notice").textContent = "";
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  try {
    const response = await fetch("/v1/compare", {
      method: "POST",
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({
        models: names,
        messages: [{ role: "user", content: at("question").value }],
        max_tokens: Number(at("length").value),
        temperature: Number(at("temperature").value),
        stream: true,
      }),
    });
    if (!response.ok) {
      if (response.status === 401) at("key-row").hidden = false;
      show("problem", (await response.json()).error.message);
      return;
    }
    let places = [];
    for await (const one of eventsOf(response)) {
      if (one.error) show("problem", one.error.message);
      else if (one.answers) {
        places = one.answers.map(place);
        show("emergency", one.emergency_notice);
        at("notice").textContent = one.notice;
      } else if (one.index !== undefined) {
        places[one.index].text.textContent += one.delta;
        const notes = [one.finish_reason === "length" ? say("cut") : "", one.flags && one.flags.length ? say("flags") : ""];
        if (one.finish_reason) places[one.index].after.textContent = notes.filter(Boolean).join(" ");
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") show("problem", say("lost") + error.message);
  } finally {
    running = null;
    at("send").disabled = false;
    at("stop").disabled = true;
  }
}

at("ask").addEventListener("submit", ask);
at("stop").addEventListener("click", () => running && running.abort());
at("key").addEventListener("change", loadModels);
at("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  translate();
});
translate();
loadModels().catch((error) => show("problem", say("lost") + error.message));
