# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which tests and cases run with every version of jax, and which with one version alone.

What a version of jax can break shows in some feature of a call: a dtype, an option, a DMA mode.
The logic of a kernel, to which most cases belong, is the same text with every version. So a few
cases that show every value of every feature run with every version, and the others with one.
"""

import pathlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import pytest

# What .ci/run leaves out of its second run, which has another version of jax. First files whose
# tests compute nothing with jax, plant bugs to prove checks that run with every version, or ask
# libtpu, which is the same in both.
FILES_ON_ANY_JAX = (
    "attention/test_tpu_planted.py",
    "bench/test_attention.py",
    "bench/test_peers.py",
    "bench/test_tpu_schedule.py",
    "bench/test_verdicts.py",
    "engine/test_chat_template.py",
    "engine/test_checkpoint.py",
    "engine/test_generation_config.py",
    "engine/test_interruptions.py",
    "engine/test_page_pool.py",
    "engine/test_scheduler.py",
    "engine/test_tokenizer.py",
    "engine/test_traffic.py",
    "engine/test_transformers_text.py",
    "engine/test_vllm_plugin.py",
    "engine/test_vllm_scheduler.py",
    "engine/test_write_plan.py",
    "kv_write/test_tpu_planted.py",
    "package/test_adapters.py",
    "package/test_docs.py",
    "package/test_hash_seed.py",
    "package/test_validate.py",
    "package/test_wheel.py",
    "test_planted.py",
)
# Then functions of files whose other tests do depend on the version: `runs` says the same of cases.
FUNCTIONS_ON_ANY_JAX = {
    # Indices, lengths and numbers at their ends: the kernel's own logic.
    "attention/test_tpu.py": (
        "test_a_decode_in_every_row",
        "test_a_decode_of_more_products_than_one_softmax_takes",
        "test_absurd_metadata_ends_and_stays_in_bounds",
        "test_causal_edge_past_16_bits",
        "test_positions_past_16_bits",
        "test_scores_far_apart",
        "test_scores_far_apart_in_bfloat16",
        "test_sequences_around_absurd_ones_are_right",
        "test_two_parts_merged_by_log_sum_exp_are_the_whole",
    ),
    "attention/test_write_and_attend.py": (
        "test_a_table_in_parts",
        "test_absurd_metadata_ends_and_stays_in_bounds",
        "test_an_id_outside_the_pool_is_skipped",
        "test_each_new_token_is_sent_once_and_none_is_read_back",
        "test_scores_far_apart",
    ),
    "kv_write/test_tpu.py": (
        "test_kinds_reach_every_regularity",
        "test_num_slices_is_clamped",
        "test_several_grid_steps",
        "test_two_entries_for_one_slot",
    ),
    # The same of jax.numpy's operations, which other tests run with every version.
    "attention/test_oracle.py": (
        "test_head_counts_and_sizes",
        "test_narrow_types",
        "test_options",
        "test_the_check_finds_planted_bugs",
    ),
    "attention/test_xla.py": (
        "test_absurd_metadata_ends",
        "test_bugs_are_caught",
        "test_new_tokens_before_position_0_see_their_sinks_alone",
    ),
    "package/test_settings.py": (
        "test_the_oracle_has_the_same_bits",
        "test_the_oracle_in_a_jit_has_the_same_bits",
    ),
    # Layouts and memory that libtpu chooses.
    "kv_write/test_compiled.py": (
        "test_made_pools_stay_where_they_are",
        "test_many_entries",
        "test_other_forms_are_copied_by_xla",
        "test_other_row_counts_are_copied",
        "test_vmem_does_not_grow_with_the_batch",
    ),
    # What the scheduler decides, and what it must not change.
    "engine/test_engine.py": (
        "test_a_planted_hash_is_seen",
        "test_a_planted_layer_offset_is_seen",
        "test_a_planted_page_table_is_seen_by_the_fused_form",
        "test_a_planted_token_is_seen_by_the_fused_form",
        "test_a_planted_write_is_seen",
        "test_one_step_ahead_every_form_writes_the_same_bits",
        "test_other_shapes_change_the_last_bits_at_most",
        "test_preemption_changes_nothing",
        "test_requests_that_cannot_be_served_are_refused_and_nothing_is_lost",
        "test_scheduling_and_writes_change_nothing",
        "test_the_prefix_cache_changes_nothing",
    ),
    # Planted faults.
    "bench/test_kernel_digest.py": ("test_a_planted_difference_is_named_and_exits_with_1",),
    "engine/test_async.py": ("test_a_planted_bug_is_seen",),
    "engine/test_kept_ids.py": ("test_planted_bugs_are_caught",),
    "engine/test_noise.py": ("test_planted_bugs_are_caught",),
    "kv_write/test_indices.py": (
        "test_the_checks_find_planted_faults",
        "test_the_checks_pass_without_a_fault",
    ),
    "package/test_examples.py": ("test_a_wrong_result_is_found",),
    # What the commands print, of schedules that libtpu makes and of steps that the host plans.
    "bench/test_engine.py": (
        "test_the_real_part_times_the_engines_own_step",
        "test_the_study_prints_and_draws",
    ),
    "bench/test_kv_write.py": (
        "test_bad_flags_are_a_sentence",
        "test_every_op_issues_fast_enough",
        "test_json_is_all_that_json_prints",
        "test_the_default_output_is_a_verdict",
    ),
    "bench/test_serve.py": ("test_a_start_with_a_full_cache_compiles_nothing",),
    "engine/test_cli.py": (
        "test_explain_draws_the_steps",
        "test_explain_prints_every_step",
        "test_explain_says_who_is_not_admitted",
        "test_generate_takes_several_prompts_and_chats",
        "test_mistakes_are_one_sentence_and_exit_code_2",
        "test_other_forms_of_write_replay_to_the_same",
        "test_replay_fails_where_one_run_has_a_wrong_page_table",
        "test_soft_alignment_is_announced_on_stderr",
    ),
}
# Cases by the backend in their names: the kernels of a TPU run with the version that has no
# interpreter for those of a GPU, which run with the other one.
CASES_ON_ANY_JAX = {
    "attention/test_hidden_values.py": ("mosaic_tpu", "xla"),
    "package/test_packed.py": ("oracle", "xla"),
}
# The files whose tests compile, by the generation in their names, and the generations that only the
# first run compiles for: the compiler, libtpu, is the same in both.
_COMPILED = ("test_compiled.py", "test_merge.py", "test_page_moves.py")
_OTHER_GENERATIONS = ("v4", "v5e", "v5p", "tpu7x")


def is_on_any_jax(path: pathlib.Path, name: str) -> bool:
    """Whether a test of this file and name is left out of the second run."""
    tests = pathlib.Path(__file__).parent
    if not path.is_relative_to(tests):
        return False
    file = path.relative_to(tests).as_posix()
    function, _, case = name.partition("[")
    return (
        file in FILES_ON_ANY_JAX
        or function in FUNCTIONS_ON_ANY_JAX.get(file, ())
        or any(part in case for part in CASES_ON_ANY_JAX.get(file, ()))
        or (path.name in _COMPILED and any(f"{x}-" in name for x in _OTHER_GENERATIONS))
    )


def runs(
    cases: Sequence[Any],
    features: Callable[[Any], Iterable[Hashable]],
    id_of: Callable[[Any], str],
) -> list[Any]:
    """The cases as parameters of a test, marked `any_jax` but for a cover of their features.

    Args:
      cases: a case, or a tuple of the test's arguments, each.
      features: the features of a case, each with its value, as hashable objects.
      id_of: the name of a case.
    """
    kept = cover([frozenset(enumerate(features(case))) for case in cases])
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            id=id_of(case),
            marks=() if i in kept else pytest.mark.any_jax,
        )
        for i, case in enumerate(cases)
    ]


def cover(features: Sequence[frozenset[Hashable]]) -> set[int]:
    """Indices of sets that together have all that is in any: each the one that adds most.

    >>> sorted(cover([frozenset("ab"), frozenset("b"), frozenset("bcd")]))
    [0, 2]
    """
    missing = frozenset().union(*features)
    kept: set[int] = set()
    while missing:
        best = max(range(len(features)), key=lambda i: len(features[i] & missing))
        kept.add(best)
        missing -= features[best]
    return kept
