"""A server of files on this machine, for tests of what fetches them."""

import http.server
import threading
import time


class FileServer:
    """An HTTP server on this machine: path -> content; every request is noted."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.promised: dict[str, int] = {}
        self.moved: dict[str, str] = {}  # path -> where to
        self.delay = 0.0  # seconds after which no answer comes
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                if outer.delay:  # long enough for the client to have gone
                    time.sleep(outer.delay)
                    return
                if self.path in outer.moved:
                    self.send_response(302)
                    self.send_header("Location", outer.moved[self.path])
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if self.path not in outer.files:
                    self.send_error(404)
                    return
                content = outer.files[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(outer.promised.get(self.path, len(content))))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "FileServer":
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()
