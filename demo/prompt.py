"""A workflow as the frontend saves it -> the API prompt that the server runs, so that there is one file of each.

The frontend stores a node's widgets as a bare list, in the order of the node's inputs in /object_info; a seed has one
more entry after it ("randomize", "fixed", ...). Only what plain workflows need is here: no subgraphs, no reroutes.
"""

import copy

BYPASSED, MUTED = 4, 2
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def bypass(workflow: dict, node_type: str) -> dict:
    """A copy of the workflow with every node of that type bypassed, as Ctrl+B does it."""
    changed = copy.deepcopy(workflow)
    nodes = [node for node in changed["nodes"] if node["type"] == node_type]
    if not nodes:
        raise ValueError(f"the workflow has no {node_type}")
    for node in nodes:
        node["mode"] = BYPASSED
    return changed


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """The API prompt of a UI-format workflow. Raises ValueError for what it cannot express."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}  # id -> (node, output)
    prompt = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in ("Note", "MarkdownNote") or node["mode"] in (BYPASSED, MUTED):
            continue
        if kind not in object_info:
            raise ValueError(f"node {node['id']}: the server has no node {kind}")
        inputs = _widgets(node, object_info[kind])
        for slot in node.get("inputs", []):
            if slot.get("link") is not None:
                inputs[slot["name"]] = _source(*links[slot["link"]], nodes, links)
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return prompt


def _widgets(node: dict, info: dict) -> dict:
    values = list(node.get("widgets_values") or [])
    found = {}
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            is_widget = isinstance(spec[0], list) or spec[0] in WIDGET_TYPES
            if not is_widget or options.get("forceInput"):
                continue
            if not values:
                raise ValueError(f"node {node['id']} ({node['type']}): widgets_values ends before {name}")
            found[name] = values.pop(0)
            if options.get("control_after_generate") or name in ("seed", "noise_seed"):
                values.pop(0)
    # After a run the frontend saves the text it shows on a node behind the values, and leaves it out when it loads.
    if any(not isinstance(value, str) for value in values):
        raise ValueError(f"node {node['id']} ({node['type']}): {values} of widgets_values belong to no input")
    return found


def _source(number: int, output: int, nodes: dict, links: dict) -> list:
    """The [node, output] that feeds a link, followed through bypassed nodes by type."""
    node = nodes[number]
    if node["mode"] == MUTED:
        raise ValueError(f"node {number} ({node['type']}) is muted, and another node needs it")
    if node["mode"] != BYPASSED:
        return [str(number), output]
    wanted = node["outputs"][output]["type"]
    for slot in node["inputs"]:
        if slot["type"] == wanted and slot.get("link") is not None:
            return _source(*links[slot["link"]], nodes, links)
    raise ValueError(f"node {number} ({node['type']}) is bypassed and has no {wanted} input to pass on")
