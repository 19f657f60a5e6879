"""Compute the areas under the fronts of `fronts.json` with broken answers as failures: their helpfulness is 0.

The fronts in that file are means over well-formed answers. The file has one share of well-formed answers for each
policy.
"""

import json
from statistics import fmean

import numpy as np
from fronts import volume
from report import RESULTS, save


def main() -> None:
    """Scale every front's helpfulness by its policy's share of well-formed answers."""
    figures = json.loads((RESULTS / "fronts.json").read_text())["figures"]
    areas = {
        label: {
            "well-formed answers alone": round(fmean(volume(np.array(front)) for front in figures["points"][label]), 3),
            "broken answers counted": round(
                fmean(volume(np.array(front) * [formed, 1.0]) for front in figures["points"][label]), 3
            ),
        }
        for label, formed in figures["infeasible"]["well-formed"].items()
    }
    save("fronts_failures", areas)


if __name__ == "__main__":
    main()
