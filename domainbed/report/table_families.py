"""Every table that the report shows, in families with a headline."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from domainbed import model_selection
from domainbed.control_tables import control_tables
from domainbed.efficiency_tables import efficiency_tables
from domainbed.explanation_tables import explanation_tables
from domainbed.group_tables import group_tables, several_test_envs_tables
from domainbed.paper_tables import paper_tables
from domainbed.per_group_tables import per_group_tables
from domainbed.rank_tables import rank_tables
from domainbed.run_index import Collected
from domainbed.screening_tables import screening_tables
from domainbed.selection_tables import selection_tables
from domainbed.table_formats import Cell, Table
from domainbed.tables import domainbed_data

METHODS = (
    model_selection.IIDAccuracySelectionMethod,
    model_selection.LeaveOneOutSelectionMethod,
    model_selection.OracleSelectionMethod,
)


Record = Mapping[str, Any]


class Family(NamedTuple):
    """Tables that answer one question.

    Attributes:
        key: the headline's id.
        missing: why there are none, where that is worth a sentence.
    """

    key: str
    title: str
    tables: Sequence[Table]
    missing: str = ""


def families(found: Collected, reference: str | None = None) -> list[Family]:
    """The families that have something to show.

    Args:
        reference: the row that times are compared with.
    """
    grouped = found.grouped
    explained = explanation_tables(found.records, found.explanations) if found.explanations else []
    several = several_test_envs_tables(found.several, model_selection.IIDAccuracySelectionMethod)
    families = [
        Family("paper", "Average and worst-group accuracy, as in the paper", paper_tables(grouped)),
        Family("groups", "Average and worst-group accuracy", group_tables(grouped)),
        Family("per-group", "Accuracy of each group", per_group_tables(grouped)),
        Family("controls", "Methods minus their controls", control_tables(grouped)),
        Family("ranks", "Average ranks", rank_tables(grouped)),
        Family("selection", "What each way of choosing would take", selection_tables(grouped)),
        Family("efficiency", "Time and memory", efficiency_tables(grouped, reference, found.timings)),
        Family("explanations", "Explanations", explained),
        _screening(grouped),
        Family("several", "Several test environments", several),
        Family("domainbed", "DomainBed's tables", [table for table in domainbed_data(found, METHODS) if _says(table)]),
    ]
    return [family for family in families if family.tables or family.missing]


def _says(table: Table) -> bool:
    """Whether some cell has a number; a method that can judge no run leaves a table without any."""
    return any(isinstance(cell, Cell) for row in table.rows for cell in row)


def _screening(records: Sequence[Record]) -> Family:
    """Screening needs what not every sweep measures; then the page says so."""
    title = "Screening: worst-group accuracy in training, validation and test"
    try:
        return Family("screening", title, screening_tables(records))
    except ValueError as error:
        return Family("screening", title, [], str(error))
