"""Run a function in several processes that know one another, over gloo on the CPU."""

import io
import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def run_on_ranks(function, ranks, folder, *arguments):
    """[function(*arguments) in each of `ranks` processes], by rank; they meet in a file of `folder`.

    `function` is one of a module, and what it returns can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cmim.train"])  # a server imports PyTorch once for all of them
    meeting = folder / f"meeting-{len(list(folder.iterdir()))}"
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_join_and_call, args=(function, r, ranks, meeting, pipes[r][1], arguments))
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        answers = []
        for receive, _ in pipes:
            assert receive.poll(300), "a process gave no answer"
            answers.append(torch.load(io.BytesIO(receive.recv_bytes()), weights_only=False))
    finally:
        for process in processes:
            process.kill()
            process.join()
    for answer in answers:
        assert not isinstance(answer, _Failure), answer.text
    return answers


class _Failure:
    def __init__(self, text):
        self.text = text


def _join_and_call(function, rank, ranks, meeting, pipe, arguments):
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
        )
        answer = function(*arguments)
    except BaseException:
        answer = _Failure(traceback.format_exc())
    buffer = io.BytesIO()
    torch.save(answer, buffer)
    pipe.send_bytes(buffer.getvalue())
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still talks to it
