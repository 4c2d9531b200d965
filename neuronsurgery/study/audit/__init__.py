"""The audit of a trained network: accuracy, who is fragile, and which few neurons carry the worst group."""

from neuronsurgery.study.audit.auditing import audit, plan
from neuronsurgery.study.audit.examples import ImageFiles, Loaded, Table, Texts, from_folders, from_table, from_texts
from neuronsurgery.study.audit.page import write_audit
from neuronsurgery.study.audit.results import Audit, Plan

__all__ = [
    "Audit",
    "ImageFiles",
    "Loaded",
    "Plan",
    "Table",
    "Texts",
    "audit",
    "from_folders",
    "from_table",
    "from_texts",
    "plan",
    "write_audit",
]
