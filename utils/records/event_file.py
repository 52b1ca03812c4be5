"""TensorBoard's event file of a run, written so that an error neither loses nor damages an event."""

import io
import os
import socket
import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from utils.records.run_folder import EVENTS


class EventFile:
    """A new event file in a folder. `add_...` keep events in memory, and `write` appends them to the file.

    PyTorch's SummaryWriter is not used: its thread ends with a traceback at the first error, and what was added since
    is lost. Here events that can't be written stay in memory, about 200 bytes per step, until `write` succeeds.
    """

    def __init__(self, folder, first_step=0):
        """TensorBoard will ignore what earlier files of the folder have after `first_step`."""
        self.path = folder / file_name(folder)
        self.size = 0  # bytes of whole events in the file
        self.unwritten = io.BytesIO()
        self.add(Event(file_version="brain.Event:2"))
        if first_step:
            self.add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, event):
        event.wall_time = time.time()
        RecordWriter(self.unwritten).write(event.SerializeToString())

    def add_scalars(self, values, step):
        """Add {name: number} at a step."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.add(Event(step=step, summary=Summary(value=scalars)))

    def add_figure(self, name, figure, step):
        """Add a matplotlib figure at a step. Raises what drawing it raises."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=figure.dpi)
        width, height = figure.canvas.get_width_height()
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png.getvalue())
        self.add(Event(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)])))

    def write(self):
        """Append all events to the file. Raises OSError, after which the same events can be written again."""
        with open(self.path, "ab") as file:
            if file.tell() > self.size:
                file.truncate(self.size)  # removes the part of an event that a failed call has written
            file.write(self.unwritten.getbuffer())
        self.size += self.unwritten.tell()
        self.unwritten = io.BytesIO()


def file_name(folder):
    """A name that sorts after those of the folder's event files, since TensorBoard reads them in this order.

    Their time in seconds is not enough where the clock was set back or a run resumes within the same second.
    """
    numbers = [path.name.split(".")[3] for path in folder.glob(EVENTS)]
    number = max([int(time.time()), *(int(number) + 1 for number in numbers if number.isdigit())])
    return f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{os.getpid()}.0"
