"A Quarto notebook filter: nbdev's own processors on standard input, since `nbdev_filter` refuses to be one since nbdev 2.3."
import json
import os
import sys
from contextlib import redirect_stdout

from execnb.nbio import dict2nb, nb2str
from nbdev.processors import FilterDefaults

os.environ["IN_TEST"] = "1"  # nbdev_export, called in a cell, then does nothing
nb = dict2nb(json.loads(sys.stdin.read()))
nb.path_ = "notebook.ipynb"  # Quarto does not say which file it is; the name only feeds `output-file`, dropped below
with redirect_stdout(sys.stderr): FilterDefaults()(nb)
front = nb.cells[0]
if front.cell_type == "raw":
    front.source = "\n".join(line for line in front.source.splitlines() if not line.startswith("output-file:"))
sys.stdout.write(nb2str(nb))
