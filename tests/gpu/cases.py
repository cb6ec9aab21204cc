"""The cases of test_kernels.py: every pair of values of any two factors stands in one of them (all-pairs), few cases."""

import itertools
import random

from kernels import KERNELS

FACTORS = {
    "kernel": tuple(KERNELS),
    "gran": ("per_block", "per_warp", "per_thread"),
    "d": (40, 64, 80, 96, 128, 160, 256),
    "dtype": ("float16", "bfloat16", "float32"),
    "layout": ("HND", "NHD"),
    "causal": (False, True),
    "mask": ("none", "bool keys", "bool dense", "add keys", "add dense", "add heads"),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "lengths": ((200, 200), (129, 257), (300, 65), (1, 190), (77, 1)),
    "lse": (False, True),
    "smooth_k": (True, False),
    "smooth_v": (False, True),
    "rotate": (True, False),
    "view": ("contiguous", "strided"),
}


def all_pairs(factors=FACTORS, tries=40):
    """Dictionaries factor -> value. Greedy: each new case is the best of `tries` random ones built around an open pair."""
    rng = random.Random(0)
    names = list(factors)
    pairs = [
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    ]  # fmt: skip
    still_open = dict.fromkeys(pairs)
    cases = []
    while still_open:
        first = next(iter(still_open))
        candidates = []
        for _ in range(tries):
            case = {name: rng.choice(values) for name, values in factors.items()}
            case.update(first)
            candidates.append((sum(pair in still_open for pair in pairs_of(case, names)), len(candidates), case))
        case = max(candidates)[2]
        cases.append(case)
        for pair in pairs_of(case, names):
            still_open.pop(pair, None)
    return cases


def pairs_of(case, names):
    return [((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2)]


def name_of(case):
    short = {"causal": "causal", "lse": "lse", "smooth_k": "smooth_k", "smooth_v": "smooth_v", "rotate": "rotate"}
    parts = [short[key] for key in short if case[key]]
    heads, lengths = ("x".join(map(str, case[key])) for key in ("heads", "lengths"))
    fixed = [case[key] for key in ("gran", "dtype", "layout", "mask", "view")]
    return "-".join([*case["kernel"], *fixed, f"d{case['d']}", f"h{heads}", f"n{lengths}", *parts]).replace(" ", "_")
