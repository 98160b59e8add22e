"""JupyterLab as this workbook opens it: `make lab`, or `jupyter lab --config=.jupyter/jupyter_lab_config.py nbs/index.ipynb`.

Settings of the page (no news, long lines wrapped) stand beside this file in overrides.json and page_config.json; your own settings come on top.
"""
import sys
import warnings
from pathlib import Path

import nbformat
from nbdev.clean import clean_nb
from nbformat.sign import NotebookNotary

here = Path(__file__).resolve().parent
kept = Path(sys.prefix) / "share" / "jupyter" / "workbook"  # in .venv: nothing is written into the checkout or into your home folder
kept.mkdir(parents=True, exist_ok=True)


def clean(model, **_):
    "What is saved is cleaned as `nbdev_clean` does it, so that a notebook that was only looked at stays as it is in git"
    if model["type"] == "notebook": clean_nb(model["content"], allowed_cell_metadata_keys=["trusted"])


c.LabApp.app_settings_dir = str(here)
c.LabApp.workspaces_dir = str(kept / "workspaces")
c.ContentsManager.pre_save_hook = clean
warnings.filterwarnings("ignore", "Overriding existing pre_save_hook")  # JupyterLab reads this file twice

# Reports and widgets are HTML with scripts, which JupyterLab shows only in notebooks that it trusts: those of this checkout.
c.NotebookNotary.db_file = str(kept / "signatures.db")
c.NotebookNotary.secret_file = str(kept / "secret")
notary = NotebookNotary(db_file=c.NotebookNotary.db_file, secret_file=c.NotebookNotary.secret_file)
for path in sorted(here.parent.glob("nbs/*.ipynb")): notary.sign(nbformat.read(path, as_version=4))
