// All ways in end here: file dialog, drop, paste, camera and examples. Each makes one record for the store "picture":
// {url, name} for a picture, {problem: {code}, name, size} for what cannot become one. Python writes all sentences.
(function () {
  "use strict";
  const element = id => document.getElementById(id);
  let ticket = 0; // of the latest offer; a slow reader must not overwrite a newer picture

  function put(record) {
    window.dash_clientside.set_props("picture", { data: { ...record, ticket: ++ticket } });
  }

  function refuse(code, name, size) {
    put({ problem: { code }, name, size });
  }

  function offer(file, name) {
    name = name || file.name;
    // Before it is read: a file of 2 GB must cost neither memory here nor a request.
    if (file.size > Number(element("choose").dataset.maxBytes)) return refuse("too_large", name, file.size);
    const mine = ++ticket;
    const reader = new FileReader();
    reader.onload = () => { if (mine === ticket) put({ url: reader.result, name }); };
    reader.onerror = () => { if (mine === ticket) refuse("unreadable", name); };
    reader.readAsDataURL(file);
  }

  // --- files -----------------------------------------------------------------------------------------------------
  function ask(capture) {
    const input = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", hidden: true });
    if (capture) input.capture = "environment"; // phones open their camera instead of the gallery
    input.addEventListener("change", () => { if (input.files[0]) offer(input.files[0]); input.remove(); });
    input.addEventListener("cancel", () => input.remove());
    document.body.append(input);
    input.click();
  }

  const marked = on => document.documentElement.toggleAttribute("data-drag", on);

  document.addEventListener("dragover", event => {
    if (event.target.closest?.("input")) return; // text may be dropped into a text field
    event.preventDefault();
    marked(event.dataTransfer.types.includes("Files"));
  });
  document.addEventListener("dragleave", event => { if (!event.relatedTarget) marked(false); });
  document.addEventListener("drop", event => {
    marked(false);
    if (event.target.closest?.("input")) return;
    event.preventDefault(); // else the browser leaves the page to show the file
    const file = event.dataTransfer.files[0];
    if (file) offer(file); else refuse("no_file");
  });

  // --- paste -----------------------------------------------------------------------------------------------------
  document.addEventListener("paste", event => {
    const file = event.clipboardData && event.clipboardData.files[0];
    if (file) { event.preventDefault(); offer(file, "Pasted picture"); }
    else if (!event.target.closest?.("input")) refuse("nothing_pasted");
  });

  async function paste() {
    try {
      for (const item of await navigator.clipboard.read()) {
        const type = item.types.find(type => type.startsWith("image/"));
        if (type) return offer(await item.getType(type), "Pasted picture");
      }
      refuse("nothing_pasted");
    } catch (error) { refuse("paste_keys"); } // no permission, or a page without https
  }

  // --- camera ----------------------------------------------------------------------------------------------------
  const CAMERA_ERRORS = { NotAllowedError: "camera_blocked", NotFoundError: "no_camera", OverconstrainedError: "no_camera" };

  async function openCamera() {
    if (!(navigator.mediaDevices && navigator.mediaDevices.getUserMedia)) return ask(true); // a page without https
    const dialog = element("camera-dialog"), video = element("camera-video");
    element("snap").disabled = true;
    dialog.showModal();
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } });
      if (!dialog.open || video.srcObject) return stream.getTracks().forEach(track => track.stop()); // closed while it was asked
      video.srcObject = stream;
    } catch (error) {
      dialog.close();
      refuse(CAMERA_ERRORS[error.name] || "camera_busy");
    }
  }

  function snap() {
    const video = element("camera-video");
    const canvas = Object.assign(document.createElement("canvas"), { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob(blob => offer(blob, "Camera picture"), "image/jpeg", 0.92);
    element("camera-dialog").close();
  }

  // These events do not bubble, so the document listens while they travel down.
  document.addEventListener("playing", event => {
    if (event.target.id === "camera-video") { element("snap").disabled = false; element("snap").focus(); }
  }, true);
  document.addEventListener("close", event => {
    if (event.target.id !== "camera-dialog") return;
    const video = element("camera-video");
    if (video.srcObject) video.srcObject.getTracks().forEach(track => track.stop());
    video.srcObject = null;
  }, true);
  document.addEventListener("error", event => {
    if (event.target.id !== "preview") return;
    window.dash_clientside.set_props("preview", { hidden: true });
    window.dash_clientside.set_props("unseen", { hidden: false });
  }, true);

  // --- buttons ---------------------------------------------------------------------------------------------------
  const actions = {
    choose: () => ask(false), camera: openCamera, paste, snap,
    "camera-close": () => element("camera-dialog").close(),
  };
  document.addEventListener("click", event => {
    const button = event.target.closest?.("button");
    if (!button) return;
    if (actions[button.id]) actions[button.id]();
    if (button.dataset.example) put({ url: button.querySelector("img").src, name: button.dataset.example });
  });

  // --- the page's own server -------------------------------------------------------------------------------------
  const fetched = window.fetch;
  const lost = on => document.documentElement.toggleAttribute("data-lost", on);
  window.fetch = (...request) => fetched(...request).then(
    response => { lost(false); return response; },
    error => { if (error.name !== "AbortError") lost(true); throw error; });

  window.dash_clientside = Object.assign({}, window.dash_clientside, { grocery: {
    preview: picture => {
      const url = picture && picture.url;
      return [url || undefined, !url, url ? picture.name : "", Boolean(url), true, url ? "Choose another picture" : "Choose a picture",
        null]; // the last prediction was another picture's
    },
    retry: (clicks, picture) => {
      if (!clicks || !picture) return window.dash_clientside.no_update;
      element("answer").focus(); // the button vanishes with the message; the focus must not vanish with it
      if (!picture.url) { element("random").click(); return window.dash_clientside.no_update; }
      return { url: picture.url, name: picture.name, ticket: ++ticket };
    },
  } });
})();
