"""Runs the notebooks here from top to bottom, and keeps what they show:

    python examples/notebooks/execute.py

Kept are texts and plots; not kept is what differs from one machine or run to the next: times, what
goes to standard error, where a notebook ran. (The tests run the notebooks too, and keep nothing.)
"""

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
NOTEBOOKS = sorted(HERE.glob("*.ipynb"))


def executed(path: Path, directory: Path) -> Any:
    """The notebook with the outputs of a new kernel that ran in a directory. Raises
    CellExecutionError for a cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(directory)}}
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=where, record_timing=False
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as work:
            nbformat.write(executed(path, Path(work)), path)
        print(path.name)


if __name__ == "__main__":
    main()
