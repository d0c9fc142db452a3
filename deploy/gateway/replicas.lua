-- The replicas of TorchServe: which of them a request goes to.
local cjson = require "cjson.safe"
local settings = require "settings"

local ANSWERED_SECONDS = 10 -- for so long an answer proves that a replica is alive

local replicas = {}

-- Requests that this nginx worker has under way at each replica, and the turn among equal replicas.
local under_way = {}
local asked = {} -- the replica that has a request, by the request's connection
local turn = 0

-- Why a replica gets no requests, or nil. One that answers clients gets them, even if the check of
-- service/gateway/watch.py failed (the queue may be long), unless it is silent altogether.
function replicas.left_out(replica)
    local why, is_silent = ngx.shared.left_out:get(replica.address)
    if why and is_silent ~= 1 and ngx.shared.answered:get(replica.address) then
        return nil
    end
    return why
end

-- The replica with the fewest requests under way, if possible one that answers and was not tried.
local function choose(tried)
    local best, least
    for i = 1, #settings.replicas do
        local replica = settings.replicas[(turn + i) % #settings.replicas + 1]
        local load = under_way[replica.name] or 0
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
    under_way[replica.name] = (under_way[replica.name] or 0) + 1
    asked[connection] = replica
end

function replicas.leave(connection)
    local replica = asked[connection]
    if replica then
        under_way[replica.name] = under_way[replica.name] - 1
        asked[connection] = nil
    end
end

-- A replica has answered a client.
function replicas.has_answered(replica)
    ngx.shared.answered:set(replica.address, true, ANSWERED_SECONDS)
end

-- What service/gateway/watch.py has found: as JSON, by address, `why` a replica gets no requests,
-- and whether it `is_silent`.
function replicas.take_left_out()
    ngx.req.read_body()
    local found = cjson.decode(ngx.req.get_body_data())
    if type(found) ~= "table" then
        return ngx.exit(400)
    end
    local left_out = ngx.shared.left_out
    for _, address in ipairs(left_out:get_keys(0)) do -- those of an earlier configuration, too
        if not found[address] then
            left_out:delete(address)
        end
    end
    for address, state in pairs(found) do
        left_out:set(address, state.why, 0, state.is_silent and 1 or 0)
    end
    ngx.exit(204)
end

return replicas
