"""Figures and tables of what is missing or named oddly."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from eql_repro.figures import plot_group_bars, plot_table


def test_a_group_that_one_method_lacks_has_a_gap():
    values = {"BCE": {"rare": 3.0}, "EQL": {"rare": 9.0, "common": 25.0}}
    for order in (values, dict(reversed(values.items()))):
        ax = plot_group_bars(order, "AP")
        heights = {bars.get_label(): bars.datavalues for bars in ax.containers}
        assert set(heights) == {"rare", "common"}
        assert sum(np.isnan(heights["common"])) == 1
        plt.close(ax.figure)
    with pytest.raises(ValueError, match="values must hold a method with a group"):
        plot_group_bars({}, "AP")


def test_a_table_names_its_columns_and_shows_what_is_missing_as_a_dash():
    frame = pd.DataFrame({0.5: [1.0, np.nan], "a|b": [pd.NA, "two\nlines"]})
    lines = plot_table(frame).splitlines()
    assert lines[0] == r"| 0.5 | a\|b |"
    assert lines[2:] == ["| 1.0 | – |", "| – | two lines |"]
