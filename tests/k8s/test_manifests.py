"""The manifests as a server would take them, and every name in one that means something in another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from k8s.crosschecks import CHECKS
from k8s.manifests import BIN, K8S, OVERLAYS, ROOT, Manifests, named_secrets, read_manifests, render
from serving.settings.stack import load_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from serving.stack import applications

CUSTOM = {"RayService", "PodMonitor", "ScrapeConfig", "PrometheusRule"}
SECRETS = {
    "SERVING__ENGINE__API_KEY": "a-key",
    "SERVING__OCR__SECRET": "a-secret",
    "SERVING__BILLING__DATABASE_URL": "postgresql://serving:word@serving-database/serving",
}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {name: render(K8S / "overlays" / name) for name in OVERLAYS}


@pytest.fixture(params=OVERLAYS)
def made(request: pytest.FixtureRequest, texts: dict[str, str]) -> Manifests:
    return read_manifests(request.param, texts[request.param])


def complaints(made: Manifests) -> list[str]:
    return [complaint for check in CHECKS for complaint in check(made)]


def with_component(overlay: str, component: str, folder: Path) -> str:
    """An overlay with one component more."""
    paths = [
        os.path.relpath(K8S / part, folder.resolve()) for part in (f"overlays/{overlay}", f"components/{component}")
    ]
    text = {"resources": [paths[0]], "components": [paths[1]]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return render(folder)


def test_core_kinds_are_valid(made: Manifests) -> None:
    checked = 0
    for item in made.objects:
        try:
            kubernetes_validate.validate(item, "1.34", strict=True)
            checked += 1
        except kubernetes_validate.SchemaNotFoundError:
            assert item["kind"] in CUSTOM, f"{item['kind']} has no schema"
    assert checked > 15


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:15:14 UTC 2025", ""),
        ("NVIDIA UNIX Open Kernel Module for x86_64  590.10  Release Build  (root@node)", ""),
        ("NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024", "NVIDIA driver 535: CUDA 13"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  570.1  Release Build", "NVIDIA driver 570: CUDA 13"),
        (None, "NVIDIA driver not found: CUDA 13 needs 580 or newer"),
    ],
)
def test_an_engines_pod_looks_at_the_nodes_driver_first(
    texts: dict[str, str], tmp_path: Path, driver: str | None, said: str
) -> None:
    group = read_manifests("gpu-prod", texts["gpu-prod"]).groups["engines"]
    first, *_ = group["template"]["spec"]["initContainers"]
    shell, flag, script = first["command"]
    file = tmp_path / "version"
    if driver is not None:
        file.write_text(f"NVRM version: {driver}\nGCC version:  gcc version 12.3.0\n")
    assert script.count("/proc/driver/nvidia/version") == 1
    command = [shell, flag, script.replace("/proc/driver/nvidia/version", str(file))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[: len(said)]) == (1 if said else 0, said)


def test_what_a_first_start_compiles_outlives_the_pod(texts: dict[str, str]) -> None:
    made = read_manifests("gpu-prod", texts["gpu-prod"])
    (model,) = yaml.safe_load(made.settings_text)["models"].values()
    (container,) = made.groups["engines"]["template"]["spec"]["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "models"}
    caches = [model["env"][name] for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE")]
    assert all(Path(folder).parts[:2] == ("/", "models") for folder in caches)
    assert mounts == {"/models"}


def test_a_field_that_there_is_not_is_an_error(made: Manifests) -> None:
    (job,) = made.of("Job")
    job["spec"]["template"]["spec"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="comand"):
        kubernetes_validate.validate(job, "1.34", strict=True)


@pytest.mark.parametrize("component", [None, "incremental-upgrade"])
def test_the_rayservice_is_valid(made: Manifests, texts: dict[str, str], component: str | None, tmp_path: Path) -> None:
    shared = next((folder / "shared" for folder in ROOT.parents[:2] if (folder / "shared/kuberay").is_dir()), None)
    if shared is None:
        pytest.skip("KubeRay's CRD is not there (shared/kuberay beside the project)")
    text = with_component(made.name, component, tmp_path) if component else texts[made.name]
    assert not complaints(read_manifests(made.name, text))
    file = tmp_path / "made.yaml"
    file.write_text(text)
    (crd,) = (shared / "kuberay").glob("ray.io_rayservices-*.gz")
    command = [sys.executable, str(shared / "tools/check_crd.py"), str(crd), str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert checked.returncode == 0, checked.stdout


def test_everything_that_is_named_is_there(made: Manifests) -> None:
    assert complaints(made) == []


@pytest.mark.parametrize(
    ("overlay", "old", "new", "complaint"),
    [
        ("cpu-dev", "serving-cpu:0.1.0", "serving-cpu:latest", "is not pinned"),
        ("cpu-dev", "rayVersion: 2.60.0", "rayVersion: 2.59.0", "rayVersion 2.59.0 is not that"),
        (
            "cpu-dev",
            "            name: serving-settings-",
            "            name: serving-setings-",
            "there is no ConfigMap serving-",
        ),
        ("cpu-dev", "key: api-key", "key: apikey", "secret serving-engine with key apikey"),
        ("gpu-prod", "secretName: serving-keys", "secretName: keys", "secret keys is not in"),
        ("gpu-prod", "key: admin-key", "key: admin", "secret serving-prometheus with key admin"),
        ("cpu-dev", "claimName: serving-models", "claimName: models", "there is no claim models"),
        ("gpu-prod", "priorityClassName: serving-critical", "priorityClassName: high", "no priority class high"),
        (
            "cpu-dev",
            "matchLabels:\n      app.kubernetes.io/component: engine\n",
            "matchLabels:\n      app.kubernetes.io/component: x\n",
            "selects no pod",
        ),
        ("cpu-dev", "targetPort: redis", "targetPort: rediss", "has no port rediss"),
        ("gpu-prod", "              name: serve\n", "              name: http\n", "has a port http"),
        ("cpu-dev", "port: haproxy-metrics", "port: haproxy", "no pod has a port haproxy"),
        ("cpu-dev", 'node-manager-port: "6380"', 'node-manager-port: "6390"', "does not let node-manager-port 6390"),
        ("cpu-dev", 'metrics-export-port: "8080"', 'metrics-export-port: "8081"', "Ray exports metrics on 8081"),
        ("cpu-dev", "{model: nano,", "{model: mini,", "engines of ['mini']"),
        (
            "cpu-dev",
            "http_options: {host: 0.0.0.0, port: 8000",
            "http_options: {host: 0.0.0.0, port: 9000",
            "not the r",
        ),
        ("cpu-dev", "mountPath: /etc/serving\n", "mountPath: /etc/settings\n", "not mounted where SERVING_SETTINGS"),
        ("cpu-dev", "mountPath: /var/lib/serving\n", "mountPath: /var/lib\n", "is not mounted at billing.directory"),
        ("cpu-dev", "{cpu-node: 1}", "{routers: 1}", "router: 0 worker groups have ['routers']"),
        (
            "cpu-dev",
            "num_replicas: 2\n        cpus_per_replica: 1",
            "num_replicas: 3\n        cpus_per_replica: 1",
            "nano: 3 to 3 replicas do not fit engines",
        ),
        ("gpu-prod", ":documents", ":document", "the OCR service is in the settings or"),
        ("gpu-prod", 'num-gpus: "1"', 'num-gpus: "2"', "told of other CPUs or GPUs"),
        ("gpu-prod", "request_timeout_s: 600", "request_timeout_s: 1200", "engine.drain_s is shorter"),
        ("gpu-prod", '- "900"', '- "500"', "request 600 s < drain 500.0 s"),
        ("cpu-dev", 'num-cpus: "0"', 'num-cpus: "1"', "the head takes replicas"),
        ("cpu-dev", "version: v2", "version: v1", "autoscaler v2 is not on"),
        ("cpu-dev", "minAvailable: 1", "maxUnavailable: 1", "only take minAvailable"),
        ("cpu-dev", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "can write to its root"),
        ("cpu-dev", "automountServiceAccountToken: false", "automountServiceAccountToken: true", "Kubernetes' token"),
        ("gpu-prod", "name: default-deny", "name: deny", "nothing is denied by default"),
        (
            "cpu-dev",
            "            app.kubernetes.io/component: head\n",
            "            app.kubernetes.io/component: head\n            app.kubernetes.io/name: serving\n",
            "are KubeRay's",
        ),
        (
            "cpu-dev",
            """'''{"cpu-node": 100}'''""",
            """'"{\\"cpu-node\\": 100}"'""",
            "are not the same to the shell",
        ),
        ("gpu-prod", 'value: "7500"', 'value: "30000"', "HAProxy needs 75100 open files"),
        ("cpu-dev", "wget -q -t 1 -T 4", "wget -q -T 4", "may ask for longer"),
        ("cpu-dev", "wget -q -t 1 -T 4", "wget -q -t 1 -T 9", "may take 18 s, and has"),
        ("gpu-prod", "touch /models/warm/deepseek-ocr", "touch /models/warm/other", "does not wait for"),
        ("gpu-prod", "--revision 9f30", "--revision 0f30", "puts another revision there than deepseek-ocr"),
        ("gpu-prod", "proxy-body-size: 50m", "proxy-body-size: 1m", "Ingress: bodies of 1m"),
        ("gpu-prod", 'proxy-read-timeout: "660"', 'proxy-read-timeout: "60"', "proxy-read-timeout is shorter"),
        ("gpu-prod", 'proxy-buffering: "off"', 'proxy-buffering: "on"', "keeps events back"),
        ("cpu-dev", "containerPort: 9101", "containerPort: 9102", "does not let haproxy-metrics through"),
        ("cpu-dev", "serving-serve-svc.serving.svc", "serving-serve-svc.default.svc", "no service of this namespace"),
    ],
)
def test_a_mismatch_is_found(texts: dict[str, str], overlay: str, old: str, new: str, complaint: str) -> None:
    text = texts[overlay]
    assert old in text, old
    found = complaints(read_manifests(overlay, text.replace(old, new)))
    assert any(complaint in line for line in found), found


def test_the_applications_are_imported_and_built(
    made: Manifests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeDeploySchema.model_validate(made.applications)
    file = tmp_path / "settings.yaml"
    file.write_text(made.settings_text)
    (pod, *_) = made.pods()
    for entry in pod.spec["containers"][0]["env"]:
        monkeypatch.setenv(entry["name"], entry.get("value", "") or SECRETS.get(entry["name"], ""))
    monkeypatch.setenv("SERVING_SETTINGS_FILE", str(file))
    monkeypatch.setattr(applications, "reach_directory", lambda namespace, lease_s: None)
    built: dict[str, Any] = {}
    for application in config.applications:
        builder = import_attr(application.import_path)
        built[application.name] = call_user_app_builder_with_args_if_necessary(builder, application.args)
    settings = load_settings(file)
    assert set(built) == set(applications.build_all(settings))
    assert built["router"]._bound_deployment.func_or_class.__name__ == "ServedRouterReplica"


def test_the_mounted_settings_pass_the_check(texts: dict[str, str], tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.yaml" for name in OVERLAYS]
    for file in files:
        file.write_text(read_manifests(file.stem, texts[file.stem]).settings_text)
    # `serving check-config` for each, in one process: vLLM, which is asked about its arguments, takes long to import.
    script = (
        "import sys; from serving.cli.main import app\n"
        "for file in sys.argv[1:]: app(['check-config', file], standalone_mode=False)"
    )
    checked = subprocess.run(
        [sys.executable, "-c", script, *files],
        capture_output=True,
        text=True,
        env={**os.environ, **SECRETS, "VLLM_LOGGING_LEVEL": "ERROR"},
        timeout=280,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.count("resources_per_replica:") == 3 * len(files)
    assert "word@" not in checked.stdout


def test_the_settings_hash_is_in_the_pods(made: Manifests) -> None:
    """So that a change of the settings is a new cluster, and the old one has the old settings until it has gone."""
    (name,) = (name for name in made.names("ConfigMap") if name.startswith("serving-settings-"))
    for pod in list(made.pods())[: 1 + len(made.groups)]:
        assert {volume["configMap"]["name"] for volume in pod.spec["volumes"] if "configMap" in volume} == {name}


def test_the_rules_are_those_of_the_rule_files(made: Manifests, tmp_path: Path) -> None:
    (rule,) = made.of("PrometheusRule")
    groups = [
        group
        for file in sorted((K8S / "monitoring/rules").glob("*.yml"))
        for group in yaml.safe_load(file.read_text())["groups"]
    ]
    assert rule["spec"]["groups"] == groups, "run: python k8s/monitoring/render_rules.py"
    promtool = shutil.which("promtool")
    if promtool is None:
        assert "CI" not in os.environ, "promtool is missing"
        pytest.skip("promtool is not installed (apt-get install prometheus)")
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump(rule["spec"]))
    checked = subprocess.run(
        [promtool, "check", "rules", file], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_every_dashboard_is_in_a_config_map(made: Manifests) -> None:
    files = {file.name for file in (K8S / "monitoring/dashboards").glob("*.json")}
    found: set[str] = set()
    for item in made.of("ConfigMap"):
        if item["metadata"].get("labels", {}).get("grafana_dashboard") == "1":
            found |= set(item["data"])
    assert found == files


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_dockerfiles_have_no_findings(image: str) -> None:
    file = K8S / f"images/{image}.Dockerfile"
    checked = subprocess.run([BIN / "hadolint", file], capture_output=True, text=True, timeout=60, check=False)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("image", ["cpu", "gpu"])
def test_images_have_fonts_for_pdfs_that_bring_none(image: str) -> None:
    *_, final = (K8S / f"images/{image}.Dockerfile").read_text().split("\nFROM ")
    assert {"fonts-noto-cjk", "fonts-dejavu-core", "fonts-liberation"} <= set(final.split())


def test_the_guide_makes_every_secret_with_its_keys() -> None:
    """All but the Ingress's, which is cert-manager's, say."""
    guide = (K8S / "README.md").read_text().partition("## Install")[2].partition("## Upgrade")[0].replace("\\\n", " ")
    made = {
        words[words.index("generic") + 1]: {
            word.partition("=")[2].partition("=")[0] for word in words if word.startswith("--from-")
        }
        for words in map(str.split, guide.splitlines())
        if "generic" in words
    }
    assert made == {name: keys for name, keys in named_secrets().items() if name != "serving-tls"}


def test_the_guides_migration_is_given_all_that_the_settings_ask_for() -> None:
    guide = (K8S / "README.md").read_text().replace("\\\n", " ")
    (command,) = (line.partition(" #")[0] for line in guide.splitlines() if "serving billing migrate --config" in line)
    given = dict(word.split("=", 1) for word in command.split() if word.startswith("SERVING__"))
    assert load_settings(ROOT / command.split()[-1], given).billing.database_url is not None
