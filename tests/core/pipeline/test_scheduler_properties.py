"""Random histories of one path: whatever happens, every request ends once, and right."""

from __future__ import annotations

from hypothesis import settings

from tests.support.pipeline_machine import PipelineMachine, Repetitive


class RepetitivePipelineMachine(Repetitive, PipelineMachine):
    """Verifies guesses."""


_SETTINGS = settings(max_examples=60, stateful_step_count=60, deadline=None)
PipelineMachine.TestCase.settings = _SETTINGS
RepetitivePipelineMachine.TestCase.settings = _SETTINGS
TestPipeline = PipelineMachine.TestCase
TestRepetitivePipeline = RepetitivePipelineMachine.TestCase
