"""The promises of a plugin, one function each. Declarations are checked for every variant, behaviour on the small ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import SkipTest

from detrcli.plugins import Model, models, resolve
from detrcli.plugins.registry import fold
from detrcli.testing import answers, behaviour, declaration, learning

Check = Callable[[Model], None]

CHECKS: tuple[Check, ...] = (
    declaration.names_are_plain,
    declaration.declaration_is_light,
    declaration.numbers_have_sources,
    declaration.a_small_variant_exists,
    declaration.parameters_are_counted,
    declaration.parts_cover_the_model,
    declaration.recipes_name_parameters,
    declaration.the_page_names_every_variant,
    declaration.declared_weights_can_be_read,
    declaration.configurations_travel,
    declaration.key_maps_run_both_ways,
    behaviour.outputs_have_their_shapes,
    behaviour.sizes_have_bounds,
    behaviour.evaluation_is_deterministic,
    behaviour.pictures_do_not_see_each_other,
    behaviour.no_mask_means_no_padding,
    behaviour.padding_is_never_read,
    behaviour.native_operators_agree,
    behaviour.models_are_what_they_were,
    learning.every_parameter_learns,
    learning.losses_stand_odd_targets,
    learning.the_loss_falls,
    answers.detections_are_in_pixels,
    answers.perfect_answers_return_the_truth,
    answers.perfect_answers_score_one,
    answers.exported_files_answer_the_same,
)


def models_of(family: str) -> list[Model]:
    """The variants of an installed family; an error that says what is wrong where there is none, or its plugin is broken."""
    resolve(family)
    return [m for m in models() if fold(m.family.name) == fold(family)]


def check_family(family: str) -> None:
    """Every check over every variant of a family; what needs software that is not here is left out."""
    for model in models_of(family):
        for check in CHECKS:
            with contextlib.suppress(SkipTest):
                check(model)
