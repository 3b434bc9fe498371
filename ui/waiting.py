"""The page that is there at once, while the libraries of the real ones are still loaded. It gives way by itself."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from studio.errors import RequestError

PAGE = b"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>The studio is starting</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<style>
body { font-family: system-ui, sans-serif; display: grid; place-content: center; min-height: 90vh; text-align: center;
  background: light-dark(#faf7f2, #141213); color: light-dark(#1d1b1a, #f4f0ea); }
h1 { font-size: 1.9rem; letter-spacing: -.03em; margin: 0; } p { color: light-dark(#544d46, #cdc4b8); }
progress { width: 16rem; accent-color: light-dark(#6a3493, #cfb0e8); }
</style></head><body><main><h1>the studio</h1><p>Starting. This page goes on by itself.</p>
<progress aria-label="starting"></progress>
<p><small>The first start gathers the settings of all methods and takes a minute.</small></p></main><script>
const look = async () => {
  try { if ((await fetch(location.href, { cache: "no-store" })).status !== 503) return location.reload(); } catch {}
  setTimeout(look, 300);
};
look();
</script></body></html>"""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503, "starting")
        for name, value in (("Content-Type", "text/html"), ("Content-Length", len(PAGE)), ("Cache-Control", "no-store"),
                            ("Retry-After", 1), ("Connection", "close")):  # fmt: skip
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


class Waiting:
    """Serves the page from its making to `close`. Raises RequestError if the port is taken."""

    def __init__(self, host: str, port: int) -> None:
        try:
            self.server = ThreadingHTTPServer((host, port), _Handler)
        except OSError as error:
            reason = error.strerror or error
            raise RequestError(f"cannot serve on port {port}: {reason}", "choose another one with --port") from None
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
