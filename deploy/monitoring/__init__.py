"""Grafana dashboards and Prometheus rules, written from the list of metrics in cluster/metrics.py."""
