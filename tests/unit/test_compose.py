"""docker-compose.yml against the rules of the Compose specification. Needs neither Docker nor a network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
FILE = CHECKOUT / "docker-compose.yml"

Service = dict[str, Any]


def words(text: str) -> set[str]:
    return set(text.split())


TOP_LEVEL = words("configs include models name networks secrets services version volumes")
SERVICE = words("""
    annotations attach blkio_config build cap_add cap_drop cgroup cgroup_parent command configs container_name
    cpu_count cpu_percent cpu_period cpu_quota cpu_rt_period cpu_rt_runtime cpu_shares cpus cpuset
    credential_spec depends_on deploy develop device_cgroup_rules devices dns dns_opt dns_search domainname
    entrypoint env_file environment expose extends external_links extra_hosts gpus group_add healthcheck
    hostname image init ipc isolation label_file labels links logging mac_address mem_limit mem_reservation
    mem_swappiness memswap_limit models network_mode networks oom_kill_disable oom_score_adj pid pids_limit
    platform ports post_start pre_stop privileged profiles provider pull_policy pull_refresh_after read_only
    restart runtime scale secrets security_opt shm_size stdin_open stop_grace_period stop_signal storage_opt
    sysctls tmpfs tty ulimits use_api_socket user userns_mode uts volumes volumes_from working_dir
""")
BUILD = words("""
    additional_contexts args cache_from cache_to context dockerfile dockerfile_inline entitlements extra_hosts
    isolation labels network no_cache platforms privileged pull secrets shm_size ssh tags target ulimits
""")
DEPLOY = words("""
    endpoint_mode labels mode placement replicas resources restart_policy rollback_config update_config
""")
HEALTHCHECK = words("disable interval retries start_interval start_period test timeout")
DURATIONS = {"interval", "start_interval", "start_period", "timeout"}
DEPENDENCY = {"condition", "required", "restart"}
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}

NAME = re.compile(r"[a-zA-Z0-9._-]+")
PROJECT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:us|ms|s|m|h))+")
PORTS = r"\d{1,5}(?:-\d{1,5})?"
PORT = re.compile(rf"(?:(?:(?:\d{{1,3}}\.){{3}}\d{{1,3}}:)?(?:{PORTS})?:)?{PORTS}(?:/(?:tcp|udp))?")
VOLUME = re.compile(r"(?P<source>[^:]+):(?P<target>/[^:]*)(?::(?:ro|rw|z|Z)(?:,(?:ro|rw|z|Z))*)?")
RESTART = re.compile(r"no|always|on-failure(?::\d+)?|unless-stopped")
UNESCAPED_DOLLAR = re.compile(r"(?<!\$)(?:\$\$)*\$(?![\$A-Za-z_{])")

COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Service] = COMPOSE["services"]
EXTENSION = "x-"


def unknown(keys: dict[str, Any], known: set[str]) -> set[str]:
    return {key for key in keys if key not in known and not key.startswith(EXTENSION)}


def dependencies(service: Service) -> dict[str, dict[str, Any]]:
    given = service.get("depends_on", {})
    return given if isinstance(given, dict) else {name: {"condition": "service_started"} for name in given}


@pytest.fixture(params=sorted(SERVICES))
def service(request: pytest.FixtureRequest) -> Service:
    found: Service = SERVICES[request.param]
    return found


def test_top_level_keys_are_known():
    assert not unknown(COMPOSE, TOP_LEVEL)
    assert PROJECT_NAME.fullmatch(COMPOSE["name"])


def test_it_has_what_the_shop_needs():
    shop = {"payments", "worker", "beat", "flower"}
    assert set(SERVICES) == {"postgres", "redis", *shop, "django", "django-worker"}


def test_names_are_valid():
    for name in [*SERVICES, *COMPOSE["volumes"]]:
        assert NAME.fullmatch(name)


def test_service_keys_are_known(service: Service):
    assert not unknown(service, SERVICE)
    assert not unknown(service.get("deploy", {}), DEPLOY)
    assert RESTART.fullmatch(service.get("restart", "no"))


def test_a_service_has_an_image_or_a_build(service: Service):
    assert "image" in service or "build" in service
    assert isinstance(service.get("command", ""), (str, list))


def test_environment_values_are_scalars(service: Service):
    for name, value in service.get("environment", {}).items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
        assert value is None or isinstance(value, (str, int, float))


def test_dependencies_exist_and_can_be_met(service: Service):
    for name, dependency in dependencies(service).items():
        assert not unknown(dependency, DEPENDENCY)
        assert dependency["condition"] in CONDITIONS
        if dependency["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[name], f"{name} can't become healthy"
        assert name in SERVICES


def test_dependencies_have_no_cycle():
    left = {name: set(dependencies(service)) for name, service in SERVICES.items()}
    while left:
        free = {name for name, needs in left.items() if not needs}
        assert free, f"each of these waits for another: {sorted(left)}"
        left = {name: needs - free for name, needs in left.items() if name not in free}


def test_healthchecks_are_well_formed(service: Service):
    check = service.get("healthcheck", {})
    assert not unknown(check, HEALTHCHECK)
    for key in DURATIONS & set(check):
        assert DURATION.fullmatch(check[key])
    assert isinstance(check.get("retries", 1), int)
    if check:
        kind, *words = check["test"]
        assert kind in {"CMD", "CMD-SHELL"}
        assert all(isinstance(word, str) for word in words)
        assert len(words) == 1 or (kind == "CMD" and words)


def test_ports_are_well_formed_and_published_once():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    for port in ports:
        assert isinstance(port, str), f"YAML may read {port} as a number in base 60: quote it"
        assert PORT.fullmatch(port)
    assert len(set(ports)) == len(ports)


def test_a_service_with_several_replicas_publishes_no_fixed_port(service: Service):
    assert service.get("deploy", {}).get("replicas", 1) == 1 or "ports" not in service


def test_volumes_are_well_formed_and_declared(service: Service):
    for volume in service.get("volumes", []):
        found = VOLUME.fullmatch(volume)
        assert found
        assert found["source"] in COMPOSE["volumes"] or found["source"].startswith(("./", "/"))


def test_declared_volumes_are_used():
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"])


def test_dollars_are_escaped():
    assert not UNESCAPED_DOLLAR.search(FILE.read_text())


def test_the_image_copies_files_that_exist(service: Service):
    build = service.get("build", {})
    assert not unknown(build, BUILD)
    assert not {"dockerfile", "dockerfile_inline"} <= set(build)
    for line in build.get("dockerfile_inline", "").splitlines():
        if line.startswith("COPY "):
            *sources, _target = line.split()[1:]
            assert all((CHECKOUT / build["context"] / source).exists() for source in sources)


def test_the_image_is_a_slim_python_3_12():
    assert SERVICES["worker"]["build"]["dockerfile_inline"].startswith("FROM python:3.12-slim\n")


def test_one_image_is_built_in_one_way():
    builds = [service["build"] for service in SERVICES.values() if "build" in service]
    assert all(build == builds[0] for build in builds)


@pytest.mark.parametrize("name", ["payments", "worker", "beat", "flower", "django", "django-worker"])
def test_commands_run_the_example_project(name: str):
    assert re.search(r"\bexample_project\.(app|payments|django_shop)\b", SERVICES[name]["command"])
