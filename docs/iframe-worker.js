/* Search in pages that are opened from the disk: a browser starts no worker there, so the script of the one that
   searches runs in a hidden frame. The plugin `offline` would load such a file from the web, and knows it by its name. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.documentElement.appendChild(frame)

      const scope = frame.contentWindow
      const message = data => new MessageEvent("message", { data })
      const load = source => new Promise((resolve, reject) => {
        const element = scope.document.createElement("script")
        Object.assign(element, { src: source, onload: resolve, onerror: reject })
        scope.document.documentElement.appendChild(element)
      })
      const address = new URL(script, document.baseURI)
      scope.importScripts = async (...sources) => {
        for (const source of sources) await load(new URL(source, address))
      }
      scope.postMessage = data => this.dispatchEvent(message(data))

      const loaded = load(address)
      this.postMessage = data => loaded.then(() => scope.dispatchEvent(message(data)))
    }

    terminate() {}
  }
}
