const map = document.getElementById("map"), panel = document.getElementById("panel");
const bounds = /* thresholds */, picks = {s: document.getElementById("pick-s"), a: document.getElementById("pick-a")};
const data = picks.a && JSON.parse(document.getElementById("losses").textContent);
const names = picks.a ? () => [picks.s.value, picks.a.value] : () => ["static", "adapted"];
let at = null, all = null;
const way = (name, nats) => name + " " + nats.toFixed(3) + " nats = " + (nats / Math.LN2).toFixed(3) + " bits, p = " +
  Math.exp(-nats).toPrecision(3);
function show(token) {
  if (at) at.classList.remove("at");
  at = token;
  at.classList.add("at");
  const s = +at.dataset.s, a = +at.dataset.a, [first, second] = names();
  panel.textContent = "“" + at.textContent.replace("\n", "↵") + "”: " + way(first, s) + "; " + way(second, a) +
    "; gain " + (s - a < 0 ? "−" : "+") + Math.abs(s - a).toFixed(3) + " nats";
  panel.hidden = false;
}
function over(event) {
  const token = event.target.closest("[data-s]");
  if (token) show(token);
}
function pick() {  // other methods: losses are thousandths of a nat, one list an article
  document.querySelectorAll("#map .tokens").forEach((article, number) => {
    const [s, a] = names().map(name => data[name][number]);
    let gain = 0;
    article.querySelectorAll("[data-s]").forEach((token, k) => {
      token.dataset.s = s[k] / 1000;
      token.dataset.a = a[k] / 1000;
      const difference = (s[k] - a[k]) / 1000, level = bounds.filter(bound => Math.abs(difference) >= bound).length;
      gain += difference;
      for (const kind of [...token.classList]) if (/^[bw]\d$/.test(kind)) token.classList.remove(kind);
      if (level) token.classList.add((difference > 0 ? "b" : "w") + level);
    });
    const told = article.parentElement.querySelectorAll("[data-gain]")[number];
    if (told) told.textContent = (gain < 0 ? "−" : "+") + Math.abs(gain / s.length).toFixed(3);
  });
  if (at) show(at);
}
if (map) {
  map.classList.add("js");
  map.addEventListener("pointerover", over);
  map.addEventListener("click", over);
  map.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    all = all || [...map.querySelectorAll("[data-s]")];
    const next = all[at ? all.indexOf(at) + step : 0];
    if (next) { show(next); next.scrollIntoView({block: "nearest"}); }
  });
}
if (picks.a) for (const choice of [picks.s, picks.a]) {
  choice.parentElement.parentElement.hidden = false;
  choice.addEventListener("change", pick);
}
