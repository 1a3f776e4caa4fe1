"""The image of the Dockerfile: built without a registry and without a daemon, run, listed and measured.

    sudo apt-get install buildah debootstrap
    sudo .venv/bin/python benchmarks/container.py --out runs/container               # for GPUs
    sudo .venv/bin/python benchmarks/container.py --device cpu --base debian:12-slim # for CPUs, from a registry

Without --base, debootstrap makes the base from Debian's packages. buildah builds as root, in a chroot. What runs in the
image has process numbers and a network of its own, without a way outside, and is nobody's root:

- rights: the user is no root and cannot become it; code and libraries cannot be written; there is no compiler;
- help: `lpclip selftrain --help`; demo: the demo's command on fewer images; predict: its probe labels images;
- model: MLflow loads the model of the demo's run, which gives these images the same labels;
- ray: `ray start --head` as KubeRay starts it, in a login shell; KubeRay's own probe; a job by `ray job submit`.

--out gets sbom.cdx.json (CycloneDX: Python's packages by cyclonedx-bom, and Debian's by dpkg-query) and container.json
(sizes and seconds). The image stays in buildah's store as --tag. A machine with mirrors of its own gives them by
--mounts, which last for the build alone: a pip.conf as /etc/pip.conf, apt's list as
/etc/apt/sources.list.d/debian.sources.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from lpclip.images.named import named_parquet
from lpclip.jobs.cli import OPTIONS
from lpclip.report.tables import format_table

ROOT = Path(__file__).resolve().parent.parent
BASE = "localhost/lpclip-base"
SOURCES = """Types: deb
URIs: http://deb.debian.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
CYCLONEDX = "cyclonedx-bom==7.5.0"
UPGRADE = "apt-get update && apt-get upgrade --yes && apt-get clean && rm -rf /var/lib/apt/lists/* /var/log/*"
# Where buildah's chroot is no wall, namespaces are: Ray looks at all processes, and takes fixed ports.
LOOPBACK = 'ip link set lo up && exec "$@"'
ALONE = ["unshare", "--net", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", LOOPBACK, "sh"]
DEMO = "python jobs/selftrain.py --limit 300 --eval-limit 100 --rounds 3"
MODEL = """
import json
import mlflow
import pyarrow.parquet as pq

mlflow.set_tracking_uri("sqlite:///mlflow.db")
run = mlflow.get_run(json.load(open("runs/demo/summary.json"))["mlflow_run"])
model = mlflow.pyfunc.load_model(f"models:/{run.outputs.model_outputs[0].model_id}")
labels = pq.read_table("labels.parquet", columns=["id", "label"]).to_pandas()
images = pq.read_table("/data/test.parquet", columns=["id", "image"]).to_pandas()
asked = labels.merge(images, on="id", validate="1:1")
assert len(asked) == 100
answers = model.predict(asked[["image"]])
same = (answers["label"].to_numpy() == asked["label"].to_numpy()).sum()
print(f"{same} of {len(asked)} labels are those of lpclip predict")
assert same == len(asked)
"""
CHECKS = {
    "rights": """
        test "$(id -u):$(id -g)" = 1000:100
        if touch /opt/lpclip/new || touch jobs/new || command -v sudo gcc cc g++; then exit 1; fi
        test -z "$(find / -xdev -type f -perm /6000 2>/dev/null)"
        pip check
    """,
    "help": "lpclip selftrain --help >/tmp/help && head -3 /tmp/help",
    "demo": f"""
        mkdir -p ~/.cache/lpclip/datasets
        ln -s /data ~/.cache/lpclip/datasets/fashion-mnist
        {DEMO} --out runs/demo
    """,
    "predict": "lpclip predict --probe runs/demo/probe --data fashion-mnist --limit 100 --out labels.parquet",
    "model": f"python -c {shlex.quote(MODEL)}",
    "ray": f"""
        export RAY_AUTH_MODE=token
        ray get-auth-token --generate >/dev/null
        bash -lc 'exec ray start --head --block --num-cpus=2' >/tmp/head.log 2>&1 &
        probe() {{ wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success; }}
        for second in $(seq 60); do probe && break; sleep 1; done
        probe || {{ cat /tmp/head.log; exit 1; }}
        ray job submit --address http://127.0.0.1:8265 -- \
            python /home/ray/lpclip/{DEMO.removeprefix("python ")} --out /home/ray/runs/job
        test -f /home/ray/runs/job/probe/probe.safetensors
        kill %1
        wait
    """,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Build the image, run it, list what is in it, and measure it."""

    out: str = "runs/container"
    """Folder for sbom.cdx.json and container.json."""
    base: str | None = None
    """Image of Debian 12 in a registry or in buildah's store; by default debootstrap makes one."""
    mirror: str = "http://deb.debian.org/debian"
    """Where debootstrap takes Debian's packages from."""
    device: str = "gpu"
    """gpu, or cpu for PyTorch's CPU build."""
    tag: str = "localhost/lpclip"
    """Name of the image."""
    mounts: tuple[str, ...] = ()
    """Files and folders of this machine that the build reads, each as HERE:IN_THE_IMAGE."""


def main(options: Options) -> None:
    """Build, run, list, measure; the first that fails ends the program."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    mounts = [f"--volume={mount}:ro" for mount in options.mounts]
    seconds: dict[str, float] = {}

    def timed(name: str, *command: str | Path) -> str:
        begin = time.monotonic()
        found = run(*command)
        seconds[name] = time.monotonic() - begin
        print(f"{name}: {seconds[name]:.0f} s, ends with {found.strip().splitlines()[-1:]}", flush=True)
        return found

    if options.base is None:
        begin = time.monotonic()
        make_base(options.mirror, mounts)
        seconds["base"] = time.monotonic() - begin
    build = ["buildah", "build", "--isolation=chroot", "--layers", *mounts, f"--tag={options.tag}"]
    arguments = [f"--build-arg=BASE={options.base or BASE}", f"--build-arg=DEVICE={options.device}"]
    timed("build", *build, *arguments, ROOT)

    container = run("buildah", "from", options.tag).strip()
    try:
        data = named_parquet("fashion-mnist", split="train").parent
        inside = f"--volume={data}:/data:ro"
        for name, script in CHECKS.items():
            command = ["bash", "-c", f"set -eu -o pipefail\n{script}"]
            timed(name, *ALONE, "buildah", "run", "--isolation=chroot", inside, container, "--", *command)
        bill = software_bill(container, mounts)
    finally:
        run("buildah", "rm", container)
    (out / "sbom.cdx.json").write_text(json.dumps(bill, indent=1) + "\n")
    layers = layer_sizes(options.tag)
    sizes = [*layers, ("all", sum(size for _, size in layers))]
    result = {"seconds": seconds, "bytes": sizes}
    (out / "container.json").write_text(json.dumps(result, indent=1) + "\n")
    rows = [{"layer": made_by, "MB": f"{size / 1e6:,.0f}"} for made_by, size in sizes]
    print(format_table(rows))
    print(f"{len(bill['components'])} packages: {out / 'sbom.cdx.json'}")


def run(*command: str | Path) -> str:
    """Run a command and return what it prints. If it fails, the program ends with the last lines of its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\n{command[0]} failed, with {done.returncode}")
    return done.stdout


def make_base(mirror: str, mounts: list[str]) -> None:
    """Debian 12 as its own slim image has it, with Debian's own servers in its list."""
    container = run("buildah", "from", "scratch").strip()
    try:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder, "root")
            run("debootstrap", "--variant=minbase", "bookworm", root, mirror)
            (root / "etc/apt/sources.list").unlink(missing_ok=True)
            (root / "etc/apt/sources.list.d/debian.sources").write_text(SOURCES)
            packed = Path(folder, "root.tar")  # buildah unpacks it with owners and rights
            run("tar", "--numeric-owner", "--exclude=./dev/*", f"--directory={root}", "-cf", packed, ".")
            run("buildah", "add", container, packed, "/")
        run("buildah", "run", "--isolation=chroot", *mounts, container, "--", "bash", "-c", UPGRADE)
        run("buildah", "commit", "--squash", container, BASE)
    finally:
        run("buildah", "rm", container)


def software_bill(container: str, mounts: list[str]) -> dict[str, Any]:
    """A CycloneDX bill of the image's Python and Debian packages. The tool goes into this container alone."""

    def inside(script: str) -> str:
        as_root = ["buildah", "run", "--isolation=chroot", "--user=0:0", *mounts, container]
        return run(*as_root, "--", "bash", "-c", script)

    inside(f"python3 -m venv /tmp/bill && /tmp/bill/bin/pip install {CYCLONEDX}")
    inside("/tmp/bill/bin/cyclonedx-py environment --output-file /tmp/bill.json /opt/lpclip/bin/python")
    bill: dict[str, Any] = json.loads(inside("cat /tmp/bill.json"))
    for line in inside(
        "dpkg-query --show --showformat '${Package} ${Version} ${Architecture}\\n'"
    ).splitlines():
        name, version, machine = line.split()
        purl = f"pkg:deb/debian/{name}@{version}?arch={machine}"
        bill["components"].append(
            {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
        )
    return bill


def layer_sizes(tag: str) -> list[tuple[str, int]]:
    """The image's layers in their order, each with what made it and its bytes, not compressed."""
    image = json.loads(run("buildah", "inspect", "--type=image", tag))
    store = json.loads(run("buildah", "info"))["store"]
    kept = Path(store["GraphRoot"], f"{store['GraphDriverName']}-layers", "layers.json")
    bytes_of = {layer.get("diff-digest"): layer["diff-size"] for layer in json.loads(kept.read_text())}
    made = [entry["created_by"] for entry in image["OCIv1"]["history"] if not entry.get("empty_layer")]
    digests = image["OCIv1"]["rootfs"]["diff_ids"]
    what = [" ".join(by.removeprefix("/bin/sh -c ").removeprefix("#(nop) ").split())[:60] for by in made]
    return [(by, bytes_of[digest]) for by, digest in zip(what, digests, strict=True)]


if __name__ == "__main__":
    main(tyro.cli(Options, config=OPTIONS))
