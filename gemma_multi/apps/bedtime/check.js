// What keeps the page from working at all. A classic script: it also runs where modules may not.
function showProblem(text) {
  document.getElementById("problem").hidden = !text;
  document.getElementById("problem").textContent = text;
}

self.CANNOT_RUN =
  location.protocol === "file:"
    ? "This page was opened as a file, and browsers let no file load a model. Serve its folder, for example with python3 -m http.server, and open the address that it prints."
    : typeof WebAssembly !== "object"
      ? "This browser has no WebAssembly, in which the model runs. Take a newer one, or allow WebAssembly in its settings."
      : typeof Worker !== "function"
        ? "This browser has no workers, in which the model runs. Take a newer one."
        : "";
document.getElementById("tell").disabled = true;
if (CANNOT_RUN) showProblem(CANNOT_RUN);
