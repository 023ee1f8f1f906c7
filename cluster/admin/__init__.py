"""The operators' port: status page, metrics and explanations of all gateways and replicas, and a playground."""
