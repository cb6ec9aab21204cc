"""An index of wheels on loopback, and what can go wrong with one."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serves `folder`. `bad` has what happens to a path that ends so, `seen` each path it was asked for."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.bad, self.seen = folder, {}, []
        self.sending, self.go_on = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that was killed is no news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, path = self.server, unquote(urlsplit(self.path).path)
        server.seen.append(self.path)
        file = server.folder / (path.lstrip("/") or "index.html")
        if file.is_dir():
            file /= "index.html"
        bad = next((bad for end, bad in server.bad.items() if path.endswith(end)), None)
        if bad == "locked":  # asks for a password
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="index"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if bad == "broken" or not file.is_file():
            return self.send_error(500 if bad else 404)
        content = file.read_bytes()
        if bad == "changed":
            content = content.replace(b"METADATA", b"METADATE")
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if file.suffix == ".html" else "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        if bad == "once":  # whole from the second time on
            server.bad.clear()
        if bad in ("once", "truncated"):
            return self.close_connection
        if bad == "slow":
            self.wfile.flush()
            server.sending.set()
            server.go_on.wait(20)
        self.wfile.write(content[half:])
