"""Run folders, from a training to the shell: making them, and reading what is in one. Free of torch.

    runs.every()                             what is in the folder of runs, newest first
    run = runs.find("detr-tiny-toys-1")      by name, or by path
    run.status, run.best_ap, run.settings()
    run.history().evaluations                one dictionary an evaluation
    run.history().steps                      one dictionary a step: loss, its terms, rate, seconds

A folder may hold anything: lines cut short, links, files of other programs, lies. All of it is read with bounds and shown as
what it is.
"""

from detrcli.runs.folder import check_place, fresh, new_run, root
from detrcli.runs.history import History
from detrcli.runs.reading import shown
from detrcli.runs.run import RUN_FILE, Run, data_name, every, find, may_remove, names, read, remove, spent

__all__ = [
    "RUN_FILE",
    "History",
    "Run",
    "check_place",
    "data_name",
    "every",
    "find",
    "fresh",
    "may_remove",
    "names",
    "new_run",
    "read",
    "remove",
    "root",
    "shown",
    "spent",
]
