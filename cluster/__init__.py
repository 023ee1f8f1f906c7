"""Many replicas: Ray, HTTP, routing. The only folder that imports ray."""
