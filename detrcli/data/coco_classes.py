"""The classes of COCO 2017: 80 names under ids 1..90 with gaps."""

from __future__ import annotations

from detrcli.types import Categories

# one row of ids 1..10, 11..20, …; "-" is an id that COCO never used
_NAMES = """
person; bicycle; car; motorcycle; airplane; bus; train; truck; boat; traffic light
fire hydrant; -; stop sign; parking meter; bench; bird; cat; dog; horse; sheep
cow; elephant; bear; zebra; giraffe; -; backpack; umbrella; -; -
handbag; tie; suitcase; frisbee; skis; snowboard; sports ball; kite; baseball bat; baseball glove
skateboard; surfboard; tennis racket; bottle; -; wine glass; cup; fork; knife; spoon
bowl; banana; apple; sandwich; orange; broccoli; carrot; hot dog; pizza; donut
cake; chair; couch; potted plant; bed; -; dining table; -; -; toilet
-; tv; laptop; mouse; remote; keyboard; cell phone; microwave; oven; toaster
sink; refrigerator; -; book; clock; vase; scissors; teddy bear; hair drier; toothbrush
"""


def coco_classes() -> Categories:
    """The 80 classes, labels contiguous."""
    named = [(i, name) for i, name in enumerate(_by_id()) if name != "-"]
    return Categories(tuple(i for i, _ in named), tuple(name for _, name in named))


def coco_channels() -> Categories:
    """The 91 class channels of models trained on raw COCO ids: label i is id i; unused ids are called `unused i`."""
    names = [f"unused {i}" if name == "-" else name for i, name in enumerate(_by_id())]
    return Categories(tuple(range(len(names))), tuple(names))


def classes_for(count: int) -> Categories:
    """The classes of a file that does not name them: COCO's when their number says so, else numbered."""
    numbered = Categories(tuple(range(count)), tuple(f"class {i}" for i in range(count)))
    return coco_of(count) or numbered


def coco_of(count: int) -> Categories | None:
    """The classes of COCO that so many are, one way or the other."""
    return next((known for known in (coco_channels(), coco_classes()) if len(known) == count), None)


def _by_id() -> list[str]:
    return ["-", *(name.strip() for row in _NAMES.strip().splitlines() for name in row.split(";"))]
