"""The serve job: a saved probe answers over HTTP, with Ray Serve, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import threading

from lpclip.config import ServeJob, UserError, check, to_dict
from lpclip.encoders.again import config_again, noted_again
from lpclip.encoders.hub import local_probe
from lpclip.encoders.on_cpu import describe_on_cpu
from lpclip.jobs.cli import mistake_in_traceback
from lpclip.jobs.console import LITE_NOTE, print_encoder, shown
from lpclip.jobs.process import start_ray
from lpclip.method.probe import Probe, load_probe
from lpclip.serving.classifier import takes_gpu


def serve_job(job: ServeJob) -> None:
    """Serve a probe until the process is interrupted.

    Raises UserError when the probe or its encoder cannot be had, the port is taken, or Ray Serve is not installed.
    """
    check(job)
    if "RAY_ADDRESS" in os.environ:
        raise UserError(
            "lpclip serve runs on this machine alone: unset RAY_ADDRESS; for a cluster, see docs/serve.yaml"
        )
    try:
        from ray import serve
        from ray.serve.config import HTTPOptions, ProxyLocation
        from ray.serve.schema import LoggingConfig

        from lpclip.serving.application import DOOR, DOOR_VARIABLE, build
        from lpclip.serving.door import APPLICATION
    except ImportError as error:
        raise UserError(f"lpclip serve needs Ray Serve, pip install 'ray[serve]' ({error})") from error
    probe = load_probe(local_probe(job.probe))
    _refuse_taken(job.host, job.port)
    _print_plan(job, probe)
    os.environ[DOOR_VARIABLE] = DOOR
    start_ray()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=job.host, port=job.port),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    try:
        serve.run(build(to_dict(job)), name=APPLICATION)
    except RuntimeError as error:
        if mistake := mistake_in_traceback(str(error)):
            raise UserError(mistake) from error
        raise
    print(f"ready: POST images to http://{job.host}:{job.port}/classify; Ctrl-C ends it", flush=True)
    threading.Event().wait()


def _print_plan(job: ServeJob, probe: Probe) -> None:
    names, on_gpu = probe.class_names, takes_gpu(job.device)
    more = ", ..." if len(names) > 5 else ""
    print(f"probe     {shown(job.probe)}, classes {', '.join(names[:5])}{more} ({len(names):,})")
    config = config_again(probe.encoder, pretrained=job.pretrained, engine=job.engine, on_gpu=on_gpu)
    if on_gpu:
        # Loading it here as well would take memory of the GPU.
        print(f"encoder   {config.encoder}, {config.precision}")
        if config.encoder == "lite":
            print(f"          ({LITE_NOTE})")
    else:
        info = describe_on_cpu(config, (), ())
        print_encoder(info)
        for note in (*info.notes, *noted_again(probe.encoder, info)):
            print(f"note      {note}")
    print(f"address   http://{job.host}:{job.port}")
    if not _is_loopback(job.host):
        print(
            "warning   anyone who reaches this port may use it: let only those whom you trust into its network"
        )
    print("Ray Serve starts, which takes some seconds", flush=True)


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((host, port))
        except socket.gaierror as error:
            raise UserError(f"--host {host} is no address of this machine ({error})") from error
        except OSError as error:
            raise UserError(
                f"port {port} cannot be listened at on {host} ({error.strerror}): choose another one with --port"
            ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
