"""Loads by layers: what a layer waits for, and in which order bands come."""

from __future__ import annotations

from unittest.mock import patch

import scenarios

from mutants.registry import instead, mutant, serving
from triton_offload.transfer import layers
from triton_offload.transfer.job import Job
from triton_offload.transfer.layers import Layers
from triton_offload.transfer.pipeline import Pipeline


@mutant("3, layers", serving("staged, layers"))
def a_layer_waits_for_the_band_before_its_own():
    def make(cut):
        def cut_early(self, runs, prepare):
            made, of_layer = cut(self, runs, prepare)
            return made, tuple(max(0, run - 1) for run in of_layer)

        return cut_early

    return instead(Layers, "cut", make)


@mutant("3, layers", serving("staged, layers, window"))
def a_layer_is_there_with_the_first_segment_of_its_band():
    def released_after(self, layer):
        if layer is None:
            return self.released if self.queued else None
        run = self.run_of_layer[layer]
        if run < len(self.landed):
            return self.landed[run]
        begun = run == len(self.landed) and self.last is not None
        return self.last.released if begun or self.queued else None

    return patch.object(Job, "released_after", released_after)


@mutant("3, layers", serving("staged, layers"))
def bands_come_in_another_order_than_layers_wait_for():
    def make(cut):
        def cut_backwards(self, runs, prepare):
            made, of_layer = cut(self, runs, prepare)
            return made[::-1], of_layer

        return cut_backwards

    return instead(Layers, "cut", make)


@mutant("3, layers", serving("staged, layers, window"))
def a_stream_does_not_wait_for_a_layer_of_the_backlog():
    def make(wait_on):
        def wait_if_queued(self, job, stream, timeout=None, layer=None):
            with self._lock:
                backlog = layer is not None and job.released_after(layer) is None
            if not backlog:
                wait_on(self, job, stream, timeout, layer)

        return wait_if_queued

    return instead(Pipeline, "wait_on", make)


@mutant("10, layers", serving("staged, layers"))
def the_host_waits_for_a_layer_until_it_is_queued():
    def wait_for_layer(self, job, layer, timeout=None):
        while not job.finished and job.released_after(layer) is None:
            with self._lock:
                self._pump()
            self._device.sleep(0.001)

    return patch.object(Pipeline, "wait_for_layer", wait_for_layer)


@mutant("layers: memory that is not pinned", serving("staged, layers, deferred"))
def a_stream_waits_for_a_layer_that_a_thread_has_to_record():
    def wait_on(self, job, stream, timeout=None, layer=None):
        with self._lock:
            self._pump()
            event = None if job.finished else job.released_after(layer)
            if event is not None:
                self._device.wait(stream, event)
                return
        self.wait(job, timeout)

    return patch.object(Pipeline, "wait_on", wait_on)


@mutant("layers: the first one comes early", scenarios.layers_beside_compute)
def a_load_by_layers_is_not_cut():
    return patch.object(layers, "_num_bands", lambda num_bytes: 1)


@mutant("layers: the first one comes early", scenarios.layers_beside_compute)
def all_of_a_load_by_layers_is_queued_before_the_first_layer():
    return patch.object(Job, "has_all_asked_for", False)


@mutant("layers: the last ones come in time", scenarios.layers_beside_compute)
def there_are_few_bands():
    return patch.object(layers, "MOST_BANDS", 4)
