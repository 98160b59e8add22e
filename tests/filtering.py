"""The site's filter on a notebook, in a process that has nbdev and torch in memory already: importing them is most of what the filter costs."""
import io
import multiprocessing
import os
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

HEAVY = ["nbdev.processors", "numpy", "torch", "torchvision", "PIL.Image", "pandas"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_filter(script: Path, path: Path) -> Done:
    "What `python _filter.py < notebook` does, in this process; called once in each"
    out, err, code = io.StringIO(), io.StringIO(), 0
    os.chdir(script.parent)
    sys.stdin = io.StringIO(path.read_text(encoding="utf-8"))
    with redirect_stdout(out), redirect_stderr(err):
        try: runpy.run_path(str(script), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            code = 1
    return Done(code, out.getvalue(), err.getvalue())


def run_filters(script: Path, paths: list, processes: int = 2) -> list:
    "Every notebook in a process of its own, forked from one that has imported what is heavy"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*HEAVY, __name__])
    with context.Pool(processes, maxtasksperchild=1) as pool:
        return pool.starmap(run_filter, [(script, path) for path in paths], chunksize=1)
