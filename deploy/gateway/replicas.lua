-- The replicas of TorchServe: which of them a request goes to.
local balancer = require "ngx.balancer"
local state = require "state"

local ANSWERED_SECONDS = 10 -- for so long an answer proves that a replica is alive

local replicas = {}

-- Requests that this nginx worker has under way at each replica, and the turn among equal replicas.
-- A replica is its address, IP:PORT.
local under_way = {}
local asked = {} -- the replica that has a request, by the request's connection
local turn = 0

-- Why a replica gets no requests, or nil. One that answers clients gets them, even if the check of
-- service/gateway/watch.py failed (the queue may be long), unless it is silent altogether.
function replicas.left_out(replica)
    local found = state.now().left_out[replica]
    if found and (found.is_silent or not ngx.shared.answered:get(replica)) then
        return found.why
    end
end

-- The replica with the fewest requests under way, if possible one that answers and was not tried.
local function choose(tried)
    local best, least
    local all = state.now().upstreams
    for i = 1, #all do
        local replica = all[(turn + i) % #all + 1]
        local load = under_way[replica] or 0
        if replicas.left_out(replica) then
            load = load + 1e6
        end
        if replica == tried then
            load = load + 1e9
        end
        if not best or load < least then
            best, least = replica, load
        end
    end
    return best
end

-- Where to try a request first.
function replicas.first()
    turn = turn + 1
    return choose()
end

-- Another replica than one that was chosen, or nil: one that is left out is no better.
function replicas.another_than(replica)
    local other = choose(replica)
    if other ~= replica and (not replicas.left_out(other) or replicas.left_out(replica)) then
        return other
    end
end

-- A request is under way at a replica, until it leaves.
function replicas.enter(connection, replica)
    under_way[replica] = (under_way[replica] or 0) + 1
    asked[connection] = replica
end

function replicas.leave(connection)
    local replica = asked[connection]
    if replica then
        local others = under_way[replica] - 1
        under_way[replica] = others > 0 and others or nil
        asked[connection] = nil
    end
end

-- A replica has answered a client.
function replicas.has_answered(replica)
    ngx.shared.answered:set(replica, true, ANSWERED_SECONDS)
end

-- Let nginx connect to the address in a subrequest's path: /_NAME/IP:PORT/…
function replicas.connect()
    local ip, port = ngx.var.uri:match "^/_%a+/([%d.]+):(%d+)/"
    assert(balancer.set_current_peer(ip, tonumber(port)))
end

return replicas
