"""Requests that end, stop or confuse other serving systems, and the tests that keep this one free of that."""

from __future__ import annotations

import pytest

from .test_known_router_bugs import missing_tests

COVERED = {
    "more top logprobs than the vocabulary has end the scheduler": [
        "unit/router/proxy/test_validation.py::test_bounds_of_fields",
        "unit/router/proxy/test_prepare.py::test_top_logprobs_of_a_pair_are_those_that_prefill_can_hand_over",
        "unit/engine/test_request_limits.py::test_fields_outside_the_vocabulary_the_prompt_or_the_server_are_refused",
        "e2e/test_direct_requests.py::test_fields_that_would_end_a_server_are_refused",
    ],
    "a bias that float32 does not hold ends the scheduler": [
        "unit/router/proxy/test_validation.py::test_bounds_of_fields",
        "unit/engine/test_request_limits.py::test_parameters_that_the_scheduler_cannot_take_are_refused",
    ],
    "a stop token outside the vocabulary ends the scheduler": [
        "unit/router/proxy/test_validation.py::test_bounds_of_fields",
        "unit/engine/test_request_limits.py::test_parameters_that_the_scheduler_cannot_take_are_refused",
    ],
    "a stop pattern that backtracks stops the scheduler": [
        "unit/engine/hooks/test_time_limit_hooks.py::test_a_pattern_that_backtracks_ends_its_request_soon",
        "e2e/test_direct_requests.py::test_parameters_that_would_end_or_stop_a_server_are_refused",
    ],
    "an abort also ends the requests whose names begin alike": [
        "unit/router/proxy/test_names.py::test_no_name_at_a_server_is_a_prefix_of_another",
        "unit/router/proxy/test_aborts.py::test_abort_ends_the_request_of_that_name_only",
        "unit/router/proxy/test_aborts.py::test_abort_that_no_client_asked_for_is_retried_or_resumed",
    ],
    "a prompt over the context gets nonsense from a pair": [
        "e2e/test_bad_input.py::test_bad_requests_are_refused_with_a_reason",
    ],
    "a pair loses what prefill knows of the first token": [
        "unit/router/proxy/test_merge.py::test_whole_answer_has_the_first_tokens_logprobs_of_prefill",
        "unit/router/proxy/test_merge.py::test_values_that_a_pair_loses_are_refused_or_asked_of_one_server",
        "e2e/test_pair_answers.py::test_each_token_has_its_logprob_among_those_of_given_ids",
    ],
    "reverse proxies and old clients are answered in the wrong framing": [
        "unit/router/http/test_edges.py::test_an_answer_to_http_1_0_is_not_chunked_and_ends",
        "unit/router/http/test_edges.py::test_both_kinds_of_connections_have_one_limit_for_a_header",
        "unit/router/http/test_edges.py::test_every_wrong_method_is_answered_405_with_the_right_ones",
        "unit/router/http/test_edges.py::test_a_request_id_of_any_bytes_comes_back_as_sent",
    ],
    "a router refuses fields of a chat that servers take": [
        "unit/router/proxy/test_validation.py::test_whole_numbers_become_integers",
        "unit/router/proxy/test_validation.py::test_null_means_the_same_as_no_value",
    ],
    "streams report no usage, or a wrong one": [
        "e2e/test_openai.py::test_streamed_chat_equals_the_whole_chat",
        "unit/router/proxy/test_names.py::test_all_events_of_an_openai_stream_have_one_id",
    ],
    "lists of prompts and n hang a pair": [
        "unit/router/proxy/test_n_sampling.py::test_as_batch_repeats_a_single_prompt",
    ],
    "values of odd types and sizes are answered with 500": [
        "unit/router/proxy/test_validation.py::test_odd_values_of_any_field_are_accepted_or_refused_by_its_name",
        "e2e/test_odd_requests.py::test_odd_values_of_every_field_do_no_harm",
    ],
    "a client's error opens breakers": [
        "unit/router/proxy/test_client_errors.py::test_client_error_is_told_once_and_opens_no_breaker",
        "unit/router/cluster/test_breaker.py::test_breaker_ignores_errors_of_the_client",
    ],
    "probes and tools find pages of a server missing": [
        "unit/router/http/test_probes.py::test_pages_of_a_server_are_answered_for_the_cluster",
        "unit/router/http/test_probes.py::test_a_page_that_no_pair_serves_is_answered_404_in_the_envelope",
        "unit/router/proxy/test_passthrough.py::test_passthrough_to_pairs_alone_is_told_what_is_missing",
    ],
    "a worker that closes idle connections fails requests": [
        "unit/router/proxy/test_connection_pool.py::test_worker_that_closes_each_connection_after_its_answer_loses_no_request",
    ],
    "the first use of a parameter stops the scheduler while it compiles": [
        "unit/engine/hooks/test_warm_up_hook.py::test_compiled_functions_are_called_with_the_samplers_shapes",
        "e2e/test_direct_requests.py::test_the_first_use_of_a_parameter_does_not_stop_others",
    ],
    "a name that is used twice ends or cuts a request": [
        "unit/router/proxy/test_aborts.py::test_two_requests_of_one_name_are_both_served",
        "unit/router/proxy/test_names.py::test_servers_never_see_a_clients_rid_as_a_name",
    ],
    "pages of other origins cannot read errors": [
        "unit/router/http/test_edges.py::test_a_page_may_read_every_error",
        "unit/router/http/test_edges.py::test_every_401_says_how_to_authenticate",
    ],
    "an error event that the network cuts is passed on as an answer": [
        "unit/router/proxy/test_event_cuts.py::test_client_is_told_of_an_error_event_however_it_is_cut",
        "unit/router/proxy/test_event_cuts.py::test_stream_in_pieces_ends_as_the_stream_in_one_piece",
    ],
    "a program that joins its forks never ends": [
        "e2e/test_frontend.py::test_frontend_fork_and_join_work",
        "e2e/test_frontend.py::test_frontend_concatenate_join_continues_with_the_joined_text",
    ],
    "logprobs of a stream differ from those of a whole answer": [
        "unit/router/proxy/test_merge.py::test_streamed_events_have_the_first_tokens_logprobs_of_prefill",
        "unit/router/proxy/test_merge.py::test_each_answer_of_a_batch_has_its_own_first_token",
    ],
    "one request ends one server after another": [
        "unit/router/proxy/test_poison_requests.py::test_request_is_tried_on_no_other_server_after_one_crashed_with_it",
        "unit/router/proxy/test_poison_requests.py::test_poison_request_is_rejected_after_two_lost_servers",
    ],
    "a launcher that is told to end leaves its children": [
        "unit/testing/test_ending.py::test_a_child_has_ended_when_a_signal_has_ended_its_script",
        "unit/testing/test_ending.py::test_a_child_ends_when_its_script_is_killed",
    ],
}


@pytest.mark.parametrize("bug", COVERED)
def test_every_known_bug_names_existing_tests(bug: str) -> None:
    assert COVERED[bug]
    assert not missing_tests(COVERED[bug]), "renamed? Then here, too"
