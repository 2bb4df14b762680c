// Browsers refuse a Worker to a page that was opened as a file. There, a hidden frame runs the worker of the search.
(() => {
  // Runs inside the frame, in place of what workers have.
  function insideFrame() {
    window.postMessage = (data) => parent.postMessage(data, "*");
    window.importScripts = (...urls) =>
      urls.reduce(
        (loaded, url) =>
          loaded.then(
            () =>
              new Promise((resolve) => {
                const script = document.createElement("script");
                script.src = url;
                script.onload = resolve;
                document.body.appendChild(script);
              }),
          ),
        Promise.resolve(),
      );
  }

  class FrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.inside = frame.contentWindow;
      this.inside.document.open();
      this.inside.document.write(
        `<body><script>(${insideFrame})()</script><script src="${url}"></script></body>`,
      );
      this.inside.document.close();
      this.ready = new Promise((resolve) => (this.inside.onload = resolve)); // `open` has removed earlier listeners
      window.addEventListener("message", (event) => {
        if (event.source !== this.inside) return;
        this.dispatchEvent(new MessageEvent("message", { data: event.data }));
        this.onmessage?.(event);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  }

  if (location.protocol === "file:") window.Worker = FrameWorker;
})();
