# The gateway's command. nginx does not read /etc/resolv.conf, but only the resolver in that file knows the names of
# other containers: Docker's is 127.0.0.11, podman's differs from network to network.
set -eu
awk '$1 == "nameserver" { print "resolver " ($2 ~ ":" ? "[" $2 "]" : $2) " valid=5s ipv6=off;"; exit }' \
  /etc/resolv.conf > /tmp/resolver.conf
if [ ! -s /tmp/resolver.conf ]; then
  echo "ERROR : /etc/resolv.conf names no nameserver, so superlink cannot be found; give the container one" >&2
  exit 1
fi
exec nginx -c /app/deployment/gateway.conf
