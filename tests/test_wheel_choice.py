"""Which wheel of an index csrc/wheels.py takes, by the names alone."""

import pytest
from stand_in import SOURCE, machine_with

from csrc import wheels

LINUX, WINDOWS = "manylinux_2_28_x86_64", "win_amd64"


def names(*wheels_):
    """The names of wheels, each told as "8.9 12.0 @12.8 #other cp310-cp310 win_amd64": archs, CUDA, other sources, tags."""
    for text in wheels_:
        words = text.split()
        archs = ["sm" + word.replace(".", "").replace("+PTX", "ptx") for word in words if word[0].isdigit()]
        cuda = next((word[1:] for word in words if word[0] == "@"), "13.0")
        source = "fedcba9876543210" if "#other" in words else SOURCE
        python = next((word for word in words if word.startswith("cp")), "cp312-cp312")
        platform = WINDOWS if WINDOWS in words else LINUX
        yield f"sage_kernels_cuda-0.1.0-{'.'.join([cuda, *archs])}.src{source}-{python}-{platform}.whl"


@pytest.fixture
def choose(tmp_path):
    """choose(wheels, gpus, **machine): the number of the wheel that is taken, or the sentence."""

    def go(given, gpus, **options):
        given = list(names(*given))
        links = [f'<A class=x HREF="{name}#sha256={"0" * 64}">{name}</A>' for name in given]
        (tmp_path / "index.html").write_text("\n".join(["<p>", '<a href="README.md">', *links]))
        options = {"python": "cp312", "platforms": ["linux_x86_64", LINUX], **options}
        found = wheels.find(str(tmp_path), machine_with(*gpus, **options))
        return found if isinstance(found, str) else given.index(found.name)

    return go


@pytest.mark.parametrize(
    "given, gpus, driver, taken",
    [
        (["8.9", "8.9 12.0", "12.0"], ["8.9"], (13, 0), 0),  # fewest extra ones
        (["12.0", "8.9 12.0"], ["12.0"], (13, 0), 0),
        (["8.9", "8.9 12.0", "8.0 8.9 12.0"], ["8.9", "12.0"], (13, 0), 1),  # all GPUs
        (["8.0", "8.0 8.9 9.0"], ["8.9"], (13, 0), 1),  # newer kernels before fewer
        (["8.0", "9.0"], ["8.7"], (13, 0), 0),  # an older minor version of the same major
        (["8.9 @12.8", "8.9"], ["8.9"], (13, 0), 1),  # the newest CUDA
        (["8.9 @12.8", "8.9"], ["8.9"], (12, 9), 0),  # that the driver runs
        (["8.9 @12.10", "8.9 @12.8"], ["8.9"], (12, 8), 0),
        (["8.9 @12.8"], ["8.9"], (12, 2), 0),  # any minor version of its major
        (["8.9 cp310-cp310", "8.9 win_amd64", "8.9 #other", "8.9"], ["8.9"], (13, 0), 3),
        (["8.9", "7.5"], ["6.1", "7.5"], (13, 0), 1),  # a GPU that no kernel runs on does not count
        (["9.0", "8.0 9.0+PTX"], ["13.0"], (13, 0), 1),  # compiled by the driver
        (["9.0+PTX", "9.0+PTX @12.8"], ["13.0"], (12, 8), 1),  # that can read it
    ],
)
def test_the_best_wheel(choose, given, gpus, driver, taken):
    assert choose(given, gpus, driver=driver) == taken
    assert choose(given[::-1], gpus, driver=driver) == len(given) - 1 - taken, "the order does not matter"


@pytest.mark.parametrize(
    "given, gpus, options, words",
    [
        (["8.9 win_amd64"], ["8.9"], {}, "is for win_amd64 and this machine is linux_x86_64 or manylinux_2_28_x86_64"),
        (["8.9 cp310-cp310", "8.9 win_amd64"], ["8.9"], {}, "is for Python cp310 and this Python is cp312"),
        (["8.9 cp312-cp312t"], ["8.9"], {}, "is for Python cp312t and this Python is cp312"),
        (["8.9"], ["8.9"], {"python": "cp312t"}, "is for Python cp312 and this Python is cp312t"),
        (["8.9 #other", "8.9 cp310-cp310"], ["8.9"], {}, "other sources (fedcba9876543210) than those here"),
        (["8.9", "8.9 #other"], ["8.9"], {"driver": (12, 9)}, "needs a driver for CUDA 13.0 and this one is for 12.9"),
        (["8.0 12.0", "9.0 #other"], ["9.0"], {}, "capability 8.0, 12.0 and GPU 0 has 9.0"),
        (["8.9"], ["8.9", "12.0"], {}, "and GPU 1 has 12.0"),
        (["8.9"], ["8.6"], {}, "GPU 0 has 8.6"),
        (["9.0"], ["13.0"], {}, "GPU 0 has 13.0"),
        (["9.0+PTX @12.8"], ["13.0"], {"driver": (12, 4)}, "GPU 0 has 13.0"),
        (["8.9"], ["6.1"], {}, "needs a GPU of compute capability 7.5 or newer: GPU 0 has 6.1"),
        (["8.9"], ["8.9"], {"driver": None}, "no NVIDIA driver|driver and none was found"),
        ([], ["8.9"], {}, "lists no sage_kernels_cuda wheel"),
    ],
)
def test_no_wheel_and_why(choose, given, gpus, options, words):
    said = choose(given, gpus, **options)
    assert isinstance(said, str) and any(part in said for part in words.split("|")), said


def test_a_python_without_gil(choose):
    assert choose(["8.9", "8.9 cp312-cp312t"], ["8.9"], python="cp312t") == 1


def test_no_gpu(choose):
    nothing = machine_with()
    nothing.gpus = ()
    assert "there is none here" in wheels.find("/nowhere", nothing)
