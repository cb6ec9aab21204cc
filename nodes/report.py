"""What one sampling run did: counted here, logged, shown on the node, and served as JSON."""

import logging
import sys
from collections import Counter, deque

KEPT = 20
_recent: deque = deque(maxlen=KEPT)


class Report:
    """Counts of one sampling run. Nothing here is read or written inside a torch.compile region."""

    def __init__(self, node_id=None):
        self.node_id = node_id
        self.step = None  # index of the sampling step that runs now
        self.model_calls = 0
        self.model_calls_on = 0  # of them, those inside start_percent .. end_percent
        self.taken: dict[tuple, dict] = {}
        self.passed: Counter = Counter()
        self.notes: dict[str, None] = {}  # a set that keeps its order
        self.errors: list[str] = []
        self.broken: dict[str, str] = {}  # kernel -> why it stays off for the rest of the run

    def took(self, choice, block) -> None:
        key = (choice.backend, choice.mode, choice.config)
        entry = self.taken.setdefault(key, {"calls": 0, "blocks": set(), "steps": set()})
        entry["calls"] += 1
        if block is not None:
            entry["blocks"].add(block)
        if self.step is not None:
            entry["steps"].add(self.step)
        for note in choice.notes:
            self.notes.setdefault(note)

    def as_dict(self) -> dict:
        taken = [
            {
                "backend": backend,
                "mode": mode,
                "config": str(config),
                "calls": entry["calls"],
                "blocks": sorted(entry["blocks"]),
                "steps": sorted(entry["steps"]),
            }
            for (backend, mode, config), entry in self.taken.items()
        ]
        return {
            "node_id": self.node_id,
            "calls": sum(entry["calls"] for entry in taken) + self.passed.total(),
            "model_calls": self.model_calls,
            "model_calls_on": self.model_calls_on,
            "taken": taken,
            "passed": [{"reason": reason, "calls": calls} for reason, calls in self.passed.most_common()],
            "notes": list(self.notes),
            "errors": list(self.errors),
        }

    def line(self) -> str:
        """The report as one readable line."""
        parts = [
            f"{entry['calls']} {'call' if entry['calls'] == 1 else 'calls'} by {backend} {mode}"
            + (f" (blocks {ranges(entry['blocks'])})" if entry["blocks"] else "")
            for (backend, mode, _), entry in self.taken.items()
        ]
        if not parts and (self.passed or not self.notes):
            parts = ["no call taken"]
        parts += [f"{calls} passed on: {reason}" for reason, calls in self.passed.most_common()]
        parts += list(self.notes) + self.errors
        return "; ".join(parts)


def ranges(numbers) -> str:
    """{0, 1, 2, 5} as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def publish(report: Report) -> None:
    """Keep the report, log it in one line, and show it on the node where this ComfyUI can."""
    _recent.append(report.as_dict())
    logging.info("Sage Attention: %s", report.line())
    server = _server()
    if report.node_id is not None and hasattr(server, "send_progress_text"):
        try:
            server.send_progress_text(report.line().replace("; ", "\n"), report.node_id)
        except Exception as error:  # a finished sampling is worth more than the text on its node
            logging.warning("Sage Attention: the report cannot be shown on the node: %s", error)


def serve_reports() -> None:
    """GET /sage_attention/reports: the last reports as JSON, oldest first."""
    from aiohttp import web

    async def reports(_request):
        return web.json_response(list(_recent))

    server = _server()
    if server is not None:
        server.routes.get("/sage_attention/reports")(reports)


def _server():
    """ComfyUI's server, or None where none runs (tests). Not imported: nothing here may start one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
