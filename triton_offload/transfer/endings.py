"""Whether what a lane has queued is over, where calls and devices may fail."""

from __future__ import annotations

import traceback
from contextlib import suppress

from triton_offload.device.base import WHERE, Device, Event
from triton_offload.errors import DeviceLostError
from triton_offload.transfer.job import Job
from triton_offload.transfer.lane_streams import LaneStreams


class Endings:
    """Tells of each event whether the work before it is over, and makes its failure the job's.

    A query that raises may mean any of three things:

    * The work failed. Its event was reached, the work is over, and its job has failed.
    * The call failed, and the work goes on: pages are still written, and its job may not end yet.
      To tell it from the first, the event is asked a second time in another way (`_is_reached`).
    * The device is lost. Nothing that was queued there runs any more: all of it is over, and every
      job has failed that is not known to have ended (`lose`).
    """

    def __init__(self, device: Device, streams: LaneStreams) -> None:
        #: why nothing can be queued any more
        self.lost: DeviceLostError | None = None
        self._device = device
        self._streams = streams
        self._drained = False  # lost, but all that was queued has ended, well or not

    def is_over(self, event: Event, job: Job) -> bool:
        """Whether nothing queued before the event runs any more; what failed of it is the job's."""
        if self.lost is not None and not self._drained:
            job.error = job.error or self.lost
            return True
        try:
            return self._is_reached(event)
        except DeviceLostError as error:
            self.lose(error)
            job.error = job.error or self.lost
        except Exception as error:
            job.error = job.error or error
        return True

    def _is_reached(self, event: Event) -> bool:
        """Raises what failed before it, once it is reached."""
        try:
            return self._device.query(event)
        except DeviceLostError:
            raise
        except Exception:
            # Something failed and is over, or the query did, and pages may still be touched.
            try:
                self._device.synchronize(event, 0.0)
            except TimeoutError:
                return False
            return True

    def lose(self, error: Exception) -> None:
        """Queue nothing any more: it would never be known to end.

        `error`: the device is lost, or not even an event can be recorded. In the second case it
        may work on, and what touches pages must end before its job is reported; only draining the
        streams still tells that it has. Jobs that it ended well are a success, then.
        """
        self._drained = False
        if isinstance(error, DeviceLostError):
            self.lost = error
            return
        self.lost = DeviceLostError(f"the device was lost: {error}")
        self.lost.__cause__ = error
        with suppress(Exception):  # where the device is lost after all, draining returns at once
            self._streams.close_streams()
            self._drained = True


def forget_frames(error: BaseException) -> None:
    """Whoever keeps a failed job's result keeps where it failed, as a note, but not the frames:
    they and their callers' hold buffers, pool and pages."""
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop()
        if each is not None:
            if each.__traceback__ is not None:
                where = "".join(traceback.format_tb(each.__traceback__))
                each.__traceback__ = None
                notes: list[str] = getattr(each, "__notes__", [])
                if not any(note.startswith(WHERE) for note in notes):  # it may end several jobs
                    each.add_note(WHERE + where)
            left += [each.__cause__, each.__context__]
