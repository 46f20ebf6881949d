"""The operators' guide, the alert rules and the dashboard, and the pattern of metric names in them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "operations.md").read_text("utf-8")
ALERTS = ROOT / "docker" / "prometheus" / "alerts.yaml"
DASHBOARD = ROOT / "docker" / "grafana" / "dense-reward.json"
METRIC = re.compile(r"dense_reward_[a-z_]+")
